# Finds the NVBench that comes inside pip's cuda-bench, for the CUDA version at hand. Asks the interpreter that builds.
# Its own CMake package asks for a newer CMake and for a link-time NVML, which a toolkit without the driver's stubs has
# not; NVML is the driver's, so it is left to be found at run time. -DNVBench_ROOT=.../cuda/bench/cu13/nvbench overrules.
find_package(Python REQUIRED COMPONENTS Interpreter)
find_package(CUDAToolkit REQUIRED)
set(_root "${NVBench_ROOT}")
if(NOT _root)
  execute_process(COMMAND ${Python_EXECUTABLE} -c "import os, cuda; print(os.pathsep.join(cuda.__path__))"
    OUTPUT_VARIABLE _paths OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
  string(REPLACE ":" ";" _paths "${_paths}")
  foreach(_path IN LISTS _paths)
    if(EXISTS ${_path}/bench/cu${CUDAToolkit_VERSION_MAJOR}/nvbench)
      set(_root ${_path}/bench/cu${CUDAToolkit_VERSION_MAJOR}/nvbench)
    endif()
  endforeach()
endif()
find_path(NVBench_INCLUDE nvbench/nvbench.cuh PATHS ${_root}/include NO_DEFAULT_PATH NO_CACHE)
find_library(NVBench_LIBRARY nvbench PATHS ${_root}/lib NO_DEFAULT_PATH NO_CACHE)
find_library(NVBench_MAIN nvbench_main PATHS ${_root}/lib NO_DEFAULT_PATH NO_CACHE)

include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(NVBench
  REQUIRED_VARS NVBench_INCLUDE NVBench_LIBRARY NVBench_MAIN
  REASON_FAILURE_MESSAGE "the GPU benchmarks need it: ${Python_EXECUTABLE} -m pip install --no-deps cuda-bench")
if(NVBench_FOUND AND NOT TARGET NVBench::main)
  add_library(NVBench::main INTERFACE IMPORTED)
  target_include_directories(NVBench::main SYSTEM INTERFACE ${NVBench_INCLUDE})
  target_link_libraries(NVBench::main INTERFACE ${NVBench_MAIN} ${NVBench_LIBRARY} CUDA::cudart_static)
  target_link_options(NVBench::main INTERFACE "LINKER:--allow-shlib-undefined")
endif()
