#!/bin/bash
# Measure the shipped table of a GPU, mode by mode, then the odd sizes; each step adds to the table.
# benchmarks/gpu_table.sh TABLE SECONDS
table=$1
bench() { (( deadline > SECONDS )) || { echo "no time: $*"; return; }; timeout "$(( deadline - SECONDS ))" python3 -m benchmarks.kernels --device gpu --limit 0.05 --repeats 5 --table "$table" "$@" || echo "not done: $*"; }
deadline=$2
all=1,2,3,4,6,8,12,16,32,64,128,512,2048
bench --modes affine4 --dtypes bf16 --rows $all
bench --modes mxfp4,nvfp4 --dtypes bf16 --rows 1,3,4,8,16,64,256,2048 --sizes 2048x2048,14336x4096
bench --modes affine8,mxfp8 --dtypes bf16 --rows 1,3,4,8,16,64,256,2048 --sizes 2048x2048,14336x4096
bench --modes affine4 --dtypes f16 --rows 1,3,4,8,64,2048 --sizes 2048x2048,14336x4096
bench --modes affine4 --dtypes bf16 --rows 1,4,12,64 --sizes 1500x4096,4x4096
