"""Which ranks: a process group, however it is given."""

import torch.distributed as dist
from torch.distributed import DeviceMesh, ProcessGroup

Group = ProcessGroup | DeviceMesh | None


def resolve(group: Group) -> ProcessGroup:
    """A process group, or that of a mesh with one dimension; None: of all ranks."""
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise ValueError(f"ring: group must be a mesh of one dimension, or one dimension of it, got {group}")
        return group.get_group()
    if group is None:
        if not dist.is_initialized():
            raise ValueError("ring: group must be given, as torch.distributed has no default process group")
        return dist.group.WORLD
    if not isinstance(group, ProcessGroup):
        raise ValueError(f"ring: group must be a process group that this rank is in, got {group!r}")
    return group


def name_of(group: Group) -> str:
    """What an operator knows a group by."""
    return resolve(group).group_name


def group_of(name: str) -> ProcessGroup:
    return dist.distributed_c10d._resolve_process_group(name)
