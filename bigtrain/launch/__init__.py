"""Launching: the same experiment on SLURM, GKE, SkyPilot, TPU VMs and plain hosts.

A `Job` (job.py) says what runs on which machines; its engine renders it (slurm.py, jobset.py,
skypilot.py, remote.py) into files and commands, which command.py prints or runs. Nothing here
schedules: machines are given, taken and given again by the engine, and a restart is the same
command again.
"""
