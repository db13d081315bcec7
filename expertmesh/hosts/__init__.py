"""Hosts: processes that hold replicas of experts on one device and compute them.

`host.py` is the host itself; `service.py` puts it behind gRPC, `__main__.py` in a process, `actor.py` in a Ray actor.
Nothing here but `actor.py` needs Ray.
"""
