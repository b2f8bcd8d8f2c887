"""Attacks on a federation, to try defences on in simulation: what dishonest sites would send."""
