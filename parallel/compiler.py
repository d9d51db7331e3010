"""What is the compiler asked for? Options that go with a program, each with its reason;
platforms that don't know one pass it over.
"""

# A step of generation is hundreds of kernels of a few microseconds. As CUDA graphs, its loop and
# branches included, the GPU starts them itself: bench_1b, one row, on an H200, 1.82 to 1.39 ms a
# token (XLA's own default is the list without the last two).
GENERATION = {
  'xla_gpu_enable_command_buffer': 'FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,DYNAMIC_SLICE_FUSION,'
  'WHILE,CONDITIONAL'
}
