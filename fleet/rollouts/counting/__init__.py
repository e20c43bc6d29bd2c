"""How many devices: counts over the whole fleet without an object per device."""
