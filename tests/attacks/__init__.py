ATTACKED = "FLEET_ATTACKED"  # in the environment: the folder whose `device_sdk` is under attack, see mutants.py
