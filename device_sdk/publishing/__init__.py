"""What `fleet-publish` is made of: see `device_sdk.publish`."""
