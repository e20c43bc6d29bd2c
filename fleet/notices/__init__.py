"""Telling people and programs outside what happened: who wants to know, what was said, and whether it arrived."""
