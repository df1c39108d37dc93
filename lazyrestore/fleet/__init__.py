"""Many copies of one snapshot: clones that are started together, and a pool of parked ones.

Nothing here knows how a process is restored: the public classes hand in what starts one.
"""
