# What packseq_core is made of: every family's CPU and CUDA files, and the kernels' instantiations.

file(GLOB PACKSEQ_CPU_SOURCES CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/csrc/*/*_cpu.cpp)
target_sources(packseq_core PRIVATE ${PACKSEQ_CPU_SOURCES}
  ${PROJECT_SOURCE_DIR}/csrc/core/build_info.cpp ${PROJECT_SOURCE_DIR}/csrc/core/cpu/isa.cpp)

# Hot CPU code (*_cpu.cpp.in) is compiled once for every instruction set; the machine's best is chosen at run time.
set(PACKSEQ_ISAS baseline)
set(PACKSEQ_FLAGS_baseline "")
if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|amd64|AMD64)$")
  list(APPEND PACKSEQ_ISAS avx2 avx512)
  set(PACKSEQ_FLAGS_avx2 -mavx2 -mfma -mf16c)
  set(PACKSEQ_FLAGS_avx512 ${PACKSEQ_FLAGS_avx2} -mavx512f -mavx512bw -mavx512dq -mavx512vl)
  target_compile_definitions(packseq_core PRIVATE PACKSEQ_X86_KERNELS=1)
endif()
file(GLOB PACKSEQ_CPU_KERNELS CONFIGURE_DEPENDS RELATIVE ${PROJECT_SOURCE_DIR}/csrc
  ${PROJECT_SOURCE_DIR}/csrc/*/*_cpu.cpp.in)
foreach(_kernels IN LISTS PACKSEQ_CPU_KERNELS)
  foreach(PACKSEQ_ISA IN LISTS PACKSEQ_ISAS)
    string(REPLACE ".cpp.in" "_${PACKSEQ_ISA}.cpp" _file ${PROJECT_BINARY_DIR}/${_kernels})
    configure_file(${PROJECT_SOURCE_DIR}/csrc/${_kernels} ${_file} @ONLY)
    set_source_files_properties(${_file} PROPERTIES
      COMPILE_OPTIONS "-O3;-ffp-contract=fast;${PACKSEQ_FLAGS_${PACKSEQ_ISA}}")
    target_sources(packseq_core PRIVATE ${_file})
  endforeach()
endforeach()

if(PACKSEQ_HAS_CUDA)
  file(GLOB PACKSEQ_CUDA_SOURCES CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/csrc/*/*.cu
    ${PROJECT_SOURCE_DIR}/csrc/ring/*.cpp)  # the ring is host code, but of no use without a GPU
  target_sources(packseq_core PRIVATE ${PACKSEQ_CUDA_SOURCES})
  target_compile_definitions(packseq_core PUBLIC PACKSEQ_HAS_CUDA=1)
  target_compile_options(packseq_core PRIVATE
    "$<$<COMPILE_LANGUAGE:CUDA>:-lineinfo;--expt-relaxed-constexpr;${PACKSEQ_CUDA_WARNINGS}>")
  find_package(Threads REQUIRED)
  target_link_libraries(packseq_core PUBLIC CUDA::cudart_static Threads::Threads ${CMAKE_DL_LIBS})

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
  foreach(PACKSEQ_TYPE __half __nv_bfloat16 float)
    configure_file(${PROJECT_SOURCE_DIR}/csrc/scan/conv1d_kernels.cu.in
      ${PROJECT_BINARY_DIR}/scan/conv1d_${PACKSEQ_TYPE}.cu @ONLY)
    target_sources(packseq_core PRIVATE ${PROJECT_BINARY_DIR}/scan/conv1d_${PACKSEQ_TYPE}.cu)
    configure_file(${PROJECT_SOURCE_DIR}/csrc/longconv/long_conv_kernels.cu.in
      ${PROJECT_BINARY_DIR}/longconv/long_conv_${PACKSEQ_TYPE}.cu @ONLY)
    target_sources(packseq_core PRIVATE ${PROJECT_BINARY_DIR}/longconv/long_conv_${PACKSEQ_TYPE}.cu)
  endforeach()

  # The scan, by csrc/scan/scan_kernels.h's mappings.
  set(_scan_f32 "PairMapping<float>")
  set(_scan_f16 "PairMapping<__half>")
  set(_scan_bf16 "PairMapping<__nv_bfloat16>")
  set(_scan_small "SmallMapping")
  set(_scan_large "LargeMapping")
  set(_scan_small_complex "SmallComplexMapping")
  set(_scan_large_complex "LargeComplexMapping")
  foreach(_kind f32 f16 bf16 small large small_complex large_complex)
    set(PACKSEQ_MAPPING "${_scan_${_kind}}")
    foreach(_direction forward backward)
      set(_file ${PROJECT_BINARY_DIR}/scan/scan_${_direction}_${_kind}.cu)
      configure_file(${PROJECT_SOURCE_DIR}/csrc/scan/scan_${_direction}.cu.in ${_file} @ONLY)
      target_sources(packseq_core PRIVATE ${_file})
    endforeach()
  endforeach()
endif()
