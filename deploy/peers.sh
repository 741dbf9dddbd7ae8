#!/bin/sh
# Brings what `make bench-peers` measures against into .peers, which git ignores: llama-server, an environment with
# OpenVINO GenAI and the converters, and random checkpoints in everybody's format (about 10 GB with the largest).
#   usage: deploy/peers.sh VENV [S M L]     VENV: our own environment, with the extra `dev`
# LLAMA_SERVER=/path/to/llama-server takes that one; else it is built from the source distribution of llama-cpp-python,
# optimised for this machine and without a BLAS library, by JOBS compilers (1) at the lowest priority.
set -eu

venv=$1
shift
home=$(pwd)/.peers
python=${PYTHON:-python3}
llama=llama_cpp_python-0.3.36
pip() { "$home/tools/bin/python" -m pip --disable-pip-version-check --quiet "$@"; }
mkdir -p "$home/bin" "$home/src"

# torch comes first and at our version: left to themselves the converters bring the build for GPUs, and with it a
# torchvision that does not fit ours and that nothing here uses.
if ! "$home/tools/bin/python" -c 'import openvino_genai, optimum.intel, gguf' 2>/dev/null; then
    echo "installing OpenVINO GenAI and the converters"
    [ -x "$home/tools/bin/python" ] || "$python" -m venv "$home/tools"
    pip install "$(grep '^torch==' constraints.txt)"
    pip install "$(grep '^torch==' constraints.txt)" transformers==5.5.4 \
        openvino==2026.4.1 openvino-genai==2026.4.1.0 openvino-tokenizers==2026.4.1.0 \
        optimum==2.3.0 optimum-intel==2.2.0 nncf==3.4.0 gguf==0.19.0
    pip uninstall --yes torchvision
fi

if [ -n "${LLAMA_SERVER:-}" ]; then
    ln -sf "$LLAMA_SERVER" "$home/bin/llama-server"
elif [ ! -x "$home/bin/llama-server" ]; then
    for tool in cmake cc c++; do
        command -v "$tool" >/dev/null || { echo "to build llama-server, install $tool (Debian: cmake g++)" >&2; exit 1; }
    done
    echo "building llama-server from $llama (half an hour on one core)"
    pip download --no-deps --no-binary llama-cpp-python \
        --dest "$home/src" "llama-cpp-python==${llama##*-}"
    tar -xzf "$home/src/$llama.tar.gz" -C "$home/src"
    # GCC 12 believes that ldtilecfg reads 8 bytes of the 64, leaves the others unwritten, and AMX machines fault.
    sed -i 's/^ *_tile_loadconfig(&tc);/    __asm__ volatile("" : : "r"(\&tc) : "memory");\n&/' \
        "$home/src/$llama/vendor/llama.cpp/ggml/src/ggml-cpu/amx/mmq.cpp"
    nice -n 19 cmake -S "$home/src/$llama/vendor/llama.cpp" -B "$home/src/llama-build" -DCMAKE_BUILD_TYPE=Release \
        -DGGML_NATIVE=ON -DGGML_BLAS=OFF -DGGML_OPENMP=ON -DBUILD_SHARED_LIBS=OFF -DLLAMA_OPENSSL=OFF \
        -DLLAMA_BUILD_UI=OFF -DLLAMA_USE_PREBUILT_UI=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF \
        -DLLAMA_BUILD_APP=OFF >"$home/src/llama-cmake.log"
    nice -n 19 cmake --build "$home/src/llama-build" --target llama-server --parallel "${JOBS:-1}" >"$home/src/llama-build.log"
    cp "$home/src/llama-build/bin/llama-server" "$home/bin/"
fi

"$venv/bin/python" -m loadtests.peers.checkpoints "$@"
