#!/usr/bin/env bash
# Builds torch and flash-attention from source, and installs this project on top of them.
#   tools/build_from_source.sh --help
set -euo pipefail

usage() {
    cat <<'TEXT'
Builds torch and flash-attention from source into a virtual environment, and installs this project
on top of them, without replacing what was built: for machines that no wheel fits, such as ARM
servers with an NVIDIA GPU (GH200), or for a revision that is not released.

usage: tools/build_from_source.sh [--dry-run] [--help]

  --dry-run   print the commands and do nothing
  --help      print this

variables of the environment:
  PYTHON_VERSION        of the virtual environment                  (default 3.11)
  CUDA_VERSION          of the toolkit in /usr/local/cuda-VERSION, or in CUDA_HOME; none: build
                        for the CPU, which leaves flash-attention out (default 12.8)
  TORCH_CUDA_ARCH_LIST  compute capabilities, such as "8.0;9.0"     (default 9.0, Hopper and GH200)
  SKIP_TORCH            1: keep the torch that is installed         (default 0)
  SKIP_FLASH_ATTN       1: leave flash-attention out                (default 0)
  TORCH_REF             tag or branch of torch                      (default v2.13.0)
  FLASH_ATTN_REF        tag or branch of flash-attention            (default v2.8.3)
  VENV                  folder of the virtual environment           (default .venv)
  BUILD_DIR             folder of the sources, kept for the next build (default build/from_source)
  MAX_JOBS              compilers at once; each may need 4 GB       (default: by cores and memory)

examples:
  tools/build_from_source.sh --dry-run
  TORCH_CUDA_ARCH_LIST=9.0 CUDA_VERSION=12.8 tools/build_from_source.sh
  SKIP_TORCH=1 FLASH_ATTN_REF=v2.8.3 MAX_JOBS=8 tools/build_from_source.sh

exit codes: 0 done, 2 usage or a missing tool, else that of the command that failed. The same
command again continues: sources are not fetched twice, and compilers reuse what is built.
TEXT
}

fail() {
    echo "error: $1" >&2
    exit 2
}

dry_run=
for argument in "$@"; do
    case $argument in
        --dry-run) dry_run=1 ;;
        --help | -h) usage && exit 0 ;;
        *) fail "unknown option '$argument': see --help" ;;
    esac
done

python_version=${PYTHON_VERSION:-3.11}
cuda_version=${CUDA_VERSION:-12.8}
arch_list=${TORCH_CUDA_ARCH_LIST:-9.0}
skip_torch=${SKIP_TORCH:-0}
skip_flash_attn=${SKIP_FLASH_ATTN:-0}
torch_ref=${TORCH_REF:-v2.13.0}
flash_attn_ref=${FLASH_ATTN_REF:-v2.8.3}
project=$(cd "$(dirname "$0")/.." && pwd)
venv=${VENV:-$project/.venv}
build=${BUILD_DIR:-$project/build/from_source}
python=$venv/bin/python
cuda_home=${CUDA_HOME:-/usr/local/cuda-$cuda_version}

# One job for each core, and for each 4 GB of memory: a build that runs out of it is killed.
default_jobs() {
    local cores memory
    cores=$(nproc)
    memory=$(awk '/^MemAvailable:/ {print int($2 / 4194304)}' /proc/meminfo)
    if ((memory < 1)); then memory=1; fi
    echo $((cores < memory ? cores : memory))
}
jobs=${MAX_JOBS:-$(default_jobs)}

for pair in "SKIP_TORCH=$skip_torch" "SKIP_FLASH_ATTN=$skip_flash_attn"; do
    [[ ${pair#*=} =~ ^[01]$ ]] || fail "$pair: give 0 or 1"
done
[[ $python_version =~ ^3\.[0-9]+$ ]] || fail "PYTHON_VERSION=$python_version: give 3.11 for example"
[[ $cuda_version =~ ^([0-9]+\.[0-9]+|none)$ ]] || fail "CUDA_VERSION=$cuda_version: give 12.8 for example, or none"
[[ $arch_list =~ ^[0-9]+\.[0-9]+[a-z]?(\+PTX)?(\;[0-9]+\.[0-9]+[a-z]?(\+PTX)?)*$ ]] ||
    fail "TORCH_CUDA_ARCH_LIST=$arch_list: give compute capabilities such as 8.0;9.0"
[[ $jobs =~ ^[1-9][0-9]*$ ]] || fail "MAX_JOBS=$jobs: give a number from 1"
[[ $torch_ref != -* && $flash_attn_ref != -* ]] || fail "TORCH_REF and FLASH_ATTN_REF are names of tags or branches"
if [[ $cuda_version == none ]]; then skip_flash_attn=1; fi

# Without --dry-run: print a command and run it.
run() {
    printf '+'
    printf ' %q' "$@"
    printf '\n'
    if [[ -z $dry_run ]]; then "$@"; fi
}

fetch() { # NAME ADDRESS REF
    if [[ ! -d $build/$1/.git ]]; then
        run git clone --depth 1 --branch "$3" --recurse-submodules --shallow-submodules "$2" "$build/$1"
    else
        run git -C "$build/$1" fetch --depth 1 origin "$3"
        run git -C "$build/$1" checkout --force FETCH_HEAD
        run git -C "$build/$1" submodule update --init --recursive --depth 1
    fi
}

check_tools() {
    local tool
    for tool in git "python$python_version"; do
        command -v "$tool" >/dev/null || fail "$tool is not on PATH: install it"
    done
    # Only a build of CUDA code needs the compiler.
    if [[ $cuda_version != none && $skip_torch$skip_flash_attn != 11 && ! -x $cuda_home/bin/nvcc ]]; then
        fail "there is no $cuda_home/bin/nvcc: install the CUDA toolkit, or set CUDA_VERSION to the one that is there, or to none"
    fi
}

if [[ -z $dry_run ]]; then check_tools; fi
run mkdir -p "$build"
if [[ ! -x $python ]]; then run "python$python_version" -m venv "$venv"; fi
run "$python" -m pip install --upgrade pip setuptools wheel ninja cmake packaging

if [[ $cuda_version == none ]]; then
    settings=(USE_CUDA=0 "MAX_JOBS=$jobs")
else
    settings=("CUDA_HOME=$cuda_home" "CUDACXX=$cuda_home/bin/nvcc" "TORCH_CUDA_ARCH_LIST=$arch_list" "MAX_JOBS=$jobs")
fi

if [[ $skip_torch == 0 ]]; then
    fetch pytorch https://github.com/pytorch/pytorch "$torch_ref"
    run "$python" -m pip install -r "$build/pytorch/requirements.txt"
    version=()
    # A release is called so: of 2.13.0a0 pip would think that it is older than 2.13.0.
    if [[ $torch_ref =~ ^v([0-9]+\.[0-9]+\.[0-9]+)$ ]]; then
        version=("PYTORCH_BUILD_VERSION=${BASH_REMATCH[1]}" PYTORCH_BUILD_NUMBER=1)
    fi
    run env "${settings[@]}" ${version[@]+"${version[@]}"} "$python" -m pip install --no-build-isolation --no-deps --verbose "$build/pytorch"
fi

if [[ $skip_flash_attn == 0 ]]; then
    fetch flash-attention https://github.com/Dao-AILab/flash-attention "$flash_attn_ref"
    # It has a list of its own: 80;90 for 8.0;9.0.
    archs=$(sed -E 's/\+PTX//g; s/[a-z]//g; s/\.//g' <<<"$arch_list")
    run env "${settings[@]}" FLASH_ATTENTION_FORCE_BUILD=TRUE "FLASH_ATTN_CUDA_ARCHS=$archs" \
        "$python" -m pip install --no-build-isolation --no-deps --verbose "$build/flash-attention"
    run "$python" -m pip install einops
fi

# A constraint on what is installed keeps pip from fetching a wheel of torch over the build.
constraints=$build/constraints.txt
write='import sys; from importlib.metadata import version; open(sys.argv[1], "w").write("torch==" + version("torch"))'
run "$python" -c "$write" "$constraints"
run "$python" -m pip install --constraint "$constraints" --editable "${project}[low-precision,trackers,evaluation]"
run "$python" -c 'import torch; print("torch", torch.__version__, torch.version.cuda, torch.cuda.get_arch_list())'
