"""The HTTP border: device, CI and operator endpoints. It has no models."""
