"""Devices, their groups, enrolment, credentials, what they run and when they were last seen."""
