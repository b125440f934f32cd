# What differs between clusters, in one place. Sourced by every batch script here, on the job's first
# node, in the directory from which the job was submitted (the root of this repository).

# Modules that a job needs:
# module purge
# module load gcc cuda

# The Python that has neftune_dist: the .venv/ of the launchers, where there is one.
[ ! -d .venv ] || PATH="$PWD/.venv/bin:$PATH"
export PATH

# With a container, the ranks run inside it and the batch script outside, whose own Python (>= 3.11)
# needs omegaconf alone. The image is made by Dockerfile (.sqsh, for Enroot and Pyxis) or by
# apptainer.def (.sif), both beside this file; the code is that of this repository, as without one.
# image=/images/neftune.sif
mounts="$PWD:$PWD" # what it sees; further folders (models, data, runs) after commas
case "${image:-}" in
*.sqsh) NEFTUNE_DIST_SRUN_OPTIONS="--container-image=$image --container-mounts=$mounts --container-workdir=$PWD" ;;
*.sif) NEFTUNE_DIST_CONTAINER="apptainer exec --nv --bind $mounts --pwd $PWD $image" ;;
?*) echo "slurm/site.sh: image=$image is neither .sqsh nor .sif" >&2 && exit 2 ;;
esac
[ -z "${image:-}" ] || NEFTUNE_DIST_PYTHON=python3
export NEFTUNE_DIST_SRUN_OPTIONS NEFTUNE_DIST_CONTAINER NEFTUNE_DIST_PYTHON

# The network interface of the nodes' fast network, where the one on the route between them is not
# it. (InfiniBand is found by NCCL itself.)
# export NCCL_SOCKET_IFNAME=eth0 GLOO_SOCKET_IFNAME=eth0

# Nodes without internet: models and data come from the cache that a login node has filled.
# export HF_HUB_OFFLINE=1 HF_HOME=/shared/huggingface
