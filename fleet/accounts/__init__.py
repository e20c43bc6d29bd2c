"""Who may call: API tokens with scope and expiry, and the operator roles."""
