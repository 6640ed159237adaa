"""The commands, one file each. A wheel has them as ``pretrain.tools``."""
