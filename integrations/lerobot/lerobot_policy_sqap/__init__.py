"""A LeRobot plug-in: policies that sqap has compressed. Importing it registers the type ``sqap``."""

from lerobot_policy_sqap.configuration_sqap import SqapConfig

__all__ = ["SqapConfig"]
