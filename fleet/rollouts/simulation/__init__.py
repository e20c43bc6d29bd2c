"""A rollout played through on virtual devices, by the policy code that the server runs. Pure: no database, no clock."""
