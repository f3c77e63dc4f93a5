#!/bin/bash
# Measure the shipped table of a GPU, the most used first; each step adds to the table.
# benchmarks/gpu_table.sh TABLE SECONDS
table=$1 deadline=$2
bench() { (( deadline > SECONDS )) || { echo "no time: $*"; return; }; timeout "$(( deadline - SECONDS ))" python3 -m benchmarks.kernels --device gpu --dtypes bf16 --limit 0.0005 --repeats 5 --table "$table" "$@" || echo "not done: $*"; }
bench --modes affine4 --rows all --sizes 14336x4096,4096x14336,4096x4096
bench --modes affine4 --rows all --sizes 2048x2048,1536x4096,151936x896
bench --modes affine8,mxfp4,nvfp4,mxfp8 --rows 1,4,8,16,64,512,2048 --sizes 14336x4096
bench --modes affine4 --rows 64,512 --sizes 8x14336x4096
bench --modes affine8,mxfp4,nvfp4,mxfp8 --rows 1,4,8,16,64,512,2048 --sizes 2048x2048
