# What differs between clusters, in one place. Sourced by every batch script here, on the job's first
# node, in the directory from which the job was submitted (the root of this repository).

# Modules that a job needs:
# module purge
# module load gcc cuda

# The Python that has neftune_dist: the .venv/ of the launchers, where there is one.
[ ! -d .venv ] || PATH="$PWD/.venv/bin:$PATH"
export PATH

# With a container, the ranks run inside it and the batch script outside, whose own Python (>= 3.11)
# needs omegaconf alone. One of these two, and the container's Python:
# export NEFTUNE_DIST_SRUN_OPTIONS="--container-image=/images/neftune.sqsh --container-mounts=$PWD --container-workdir=$PWD"  # Enroot/Pyxis
# export NEFTUNE_DIST_CONTAINER="apptainer exec --nv --bind $PWD /images/neftune.sif"                     # Apptainer
# export NEFTUNE_DIST_PYTHON=python3

# The network interface of the nodes' fast network, where the one on the route between them is not
# it. (InfiniBand is found by NCCL itself.)
# export NCCL_SOCKET_IFNAME=eth0 GLOO_SOCKET_IFNAME=eth0

# Nodes without internet: models and data come from the cache that a login node has filled.
# export HF_HUB_OFFLINE=1 HF_HOME=/shared/huggingface
