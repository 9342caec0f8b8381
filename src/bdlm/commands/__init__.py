"""The commands of `bdlm`, one small file each: a frozen dataclass `Options` (its fields are the
flags) and `run(options)`."""
