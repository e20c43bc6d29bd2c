"""Rollouts and their stages. `policy` decides, purely; `services` changes states; the tick joins them."""
