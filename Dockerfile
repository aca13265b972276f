# The project with all that a run and its tools need. torch's wheels bring CUDA's libraries; the host, its driver and container toolkit.
#
#   docker build -t llama3 .
#   docker run --gpus all --ipc host --ulimit memlock=-1 --volume "$PWD/runs:/runs" llama3 llama3-pretrain --config /runs/run.yaml
#
# Under Slurm: docs/slurm.md. --optimizer-cpu-offload compiles with nvcc, which is not in here: take a CUDA "devel" image with
# Python 3.11 or later as BASE for it.
ARG BASE=python:3.11-slim
FROM $BASE
# g++: torch.compile and DeepSpeed compile at run time
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/megatron_llama3
COPY requirements.txt .
RUN python -m pip install --no-cache-dir -r requirements.txt
COPY . .
RUN python -m pip install --no-cache-dir --no-deps .
