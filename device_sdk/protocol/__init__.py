"""The wire between device, CI and server: names, messages, limits. Pure: no IO, no clock, no Django, no onnxruntime.

Both sides import this package and neither imports the other, so a message has one definition and one parser.
Everything that arrives is hostile until a parser here has returned a frozen dataclass.
"""
