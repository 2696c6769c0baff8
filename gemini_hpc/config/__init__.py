"""Run and site configuration: YAML in, one frozen object out, resolved YAML to the run directory."""

from gemini_hpc.config.load import CONFIG_FILE, dump, load_run, read_run
from gemini_hpc.config.run import (
    EXAMPLE,
    ClusterConfig,
    DataConfig,
    Drill,
    ModelConfig,
    ProtectConfig,
    RecoveryConfig,
    RunConfig,
    TrainConfig,
)
from gemini_hpc.config.site import SiteConfig, resolve_site, site_names

__all__ = [
    "CONFIG_FILE",
    "EXAMPLE",
    "ClusterConfig",
    "DataConfig",
    "Drill",
    "ModelConfig",
    "ProtectConfig",
    "RecoveryConfig",
    "RunConfig",
    "SiteConfig",
    "TrainConfig",
    "dump",
    "load_run",
    "read_run",
    "resolve_site",
    "site_names",
]
