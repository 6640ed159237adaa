# docker build --target cpu -t moe-pretrain .         a laptop, a CI machine
# docker build --target cuda -t moe-pretrain:cuda .   a node with GPUs: docker run --gpus all --ipc host ...
#
# The steps are those of the Makefile, so that an image holds what a checkout holds after `make install`. Data and runs are mounted:
#   docker run --rm -it -v "$PWD/data:/app/data" -v "$PWD/runs:/app/runs" moe-pretrain make quickstart
#
# pip's usual index has torch with CUDA libraries under this name. A CPU image is some GB smaller with the wheels of PyTorch's CPU index:
#   --build-arg TORCH="torch==2.13.0 --index-url URL"
# .git stays outside. A run in the image notes the commit that it was built from where that is told:
#   --build-arg COMMIT="$(git rev-parse HEAD)"
ARG TORCH=torch==2.13.0
ARG CUDA=13.0.2

FROM python:3.11-slim AS cpu
ARG TORCH
# gcc: torch.compile, Triton and DeepSpeed's CPU operators build code when they are first used. git: a run notes the state of its checkout.
RUN apt-get update && apt-get install -y --no-install-recommends make git gcc g++ && rm -rf /var/lib/apt/lists/*
WORKDIR /app
COPY Makefile requirements.txt ./
RUN make requirements TORCH="$TORCH"
COPY . .
# The package itself; and the copied requirements may be newer than the environment. No container installs anything.
RUN make install TORCH="$TORCH"
ARG COMMIT
ENV IMAGE_COMMIT="$COMMIT"
ENV PATH="/app/.venv/bin:$PATH"
CMD ["make", "help"]

# With nvcc, which DeepSpeed's own operators need (fused Adam, offloading).
FROM nvidia/cuda:${CUDA}-cudnn-devel-ubuntu24.04 AS cuda
ARG TORCH
RUN apt-get update && apt-get install -y --no-install-recommends make git python3-dev python3-venv && rm -rf /var/lib/apt/lists/*
WORKDIR /app
COPY Makefile requirements.txt ./
RUN make requirements TORCH="$TORCH"
COPY . .
# The package itself; and the copied requirements may be newer than the environment. No container installs anything.
RUN make install TORCH="$TORCH"
ARG COMMIT
ENV IMAGE_COMMIT="$COMMIT"
ENV PATH="/app/.venv/bin:$PATH"
CMD ["make", "help"]
