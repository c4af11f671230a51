"""slmops: run small language models through their whole life.

One recipe, one command, one chain of proof from a teacher's answer to the bytes on a device.
Importing this package is cheap: it pulls in none of the stages and none of their libraries.
"""

__version__ = "0.1.0"
