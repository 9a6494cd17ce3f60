"""The packages, which setup.cfg cannot list: two folders at the top are packages inside grpo_ds in a wheel."""

from setuptools import find_packages, setup

SHIPPED = {f"grpo_ds.{folder}": folder for folder in ("ds_configs", "configs")}
setup(packages=[*find_packages(include=["grpo_ds*"]), *SHIPPED], package_dir=SHIPPED)
