# What packseq_core is made of: every family's CPU and CUDA files, and the kernels' instantiations.

file(GLOB PACKSEQ_CPU_SOURCES CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/csrc/*/*_cpu.cpp)
target_sources(packseq_core PRIVATE ${PACKSEQ_CPU_SOURCES} ${PROJECT_SOURCE_DIR}/csrc/core/build_info.cpp)

if(PACKSEQ_HAS_CUDA)
  file(GLOB PACKSEQ_CUDA_SOURCES CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/csrc/*/*.cu)
  target_sources(packseq_core PRIVATE ${PACKSEQ_CUDA_SOURCES})
  target_compile_definitions(packseq_core PUBLIC PACKSEQ_HAS_CUDA=1)
  target_compile_options(packseq_core PRIVATE
    $<$<COMPILE_LANGUAGE:CUDA>:-lineinfo --expt-relaxed-constexpr -Werror=all-warnings -Xcompiler=-Wall,-Wextra,-Werror>)
  target_link_libraries(packseq_core PUBLIC CUDA::cudart_static)

  # One file an instantiation, so that they compile side by side.
  foreach(_dtype f16 bf16)
    set(PACKSEQ_TYPE __half)
    if(_dtype STREQUAL "bf16")
      set(PACKSEQ_TYPE __nv_bfloat16)
    endif()
    foreach(_dim 64 96 128 192 256)
      foreach(_direction forward backward)
        configure_file(${PROJECT_SOURCE_DIR}/csrc/attention/${_direction}_sm80.cu.in
          ${PROJECT_BINARY_DIR}/attention/${_direction}_sm80_${_dtype}_${_dim}.cu @ONLY)
        target_sources(packseq_core PRIVATE ${PROJECT_BINARY_DIR}/attention/${_direction}_sm80_${_dtype}_${_dim}.cu)
      endforeach()
    endforeach()
  endforeach()
endif()
