"""Trainings over the machines of a Ray cluster.

- `machines`: the machines that a cluster has, as a worker sees them.
- `__main__`: the program that a worker starts in place of a trainer. It places a training in the cluster.
- `host`: one machine of a training, a Ray actor with a trainer of its own.
- `health`: the devices of a cluster, and whether a worker can trust them.
- `device_check`: a small computation on devices of a cluster.
"""
