"""What configurations may name, told without importing torch, so that `--help` is there at once."""

POLICY_NAMES = (
    "full",
    "adsa",
    "adsa_inverse",
    "adsa_plus",
    "window",
    "streaming",
    "random",
    "uniform",
    "neighborhood",
    "h2o",
    "tova",
    "snapkv",
    "lines",
    "keydiff",
    "knorm",
    "r_kv",
)
CACHE_DTYPES = ("fp32", "fp16", "bf16", "fp64", "int8", "int4")
