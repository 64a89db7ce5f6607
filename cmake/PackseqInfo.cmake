# What a build says of itself: the version (pyproject.toml), the git commit, the chips. Writes core/build_config.h.
file(STRINGS ${PROJECT_SOURCE_DIR}/pyproject.toml _version REGEX "^version = " LIMIT_COUNT 1)
string(REGEX REPLACE "^version = \"(.*)\"$" "\\1" PACKSEQ_VERSION "${_version}")

set(PACKSEQ_COMMIT "")
find_package(Git QUIET)
if(GIT_FOUND AND EXISTS ${PROJECT_SOURCE_DIR}/.git)
  execute_process(COMMAND ${GIT_EXECUTABLE} rev-parse --short=12 HEAD WORKING_DIRECTORY ${PROJECT_SOURCE_DIR}
    OUTPUT_VARIABLE PACKSEQ_COMMIT OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
  execute_process(COMMAND ${GIT_EXECUTABLE} rev-parse --git-path logs/HEAD WORKING_DIRECTORY ${PROJECT_SOURCE_DIR}
    OUTPUT_VARIABLE _log OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
  cmake_path(ABSOLUTE_PATH _log BASE_DIRECTORY ${PROJECT_SOURCE_DIR})
  if(EXISTS ${_log})  # a new commit configures anew
    set_property(DIRECTORY ${PROJECT_SOURCE_DIR} APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${_log})
  endif()
endif()

set(PACKSEQ_CUDA_VERSION "")
set(PACKSEQ_ARCHITECTURES "")
if(PACKSEQ_HAS_CUDA)
  set(PACKSEQ_CUDA_VERSION ${CUDAToolkit_VERSION_MAJOR}.${CUDAToolkit_VERSION_MINOR})
  set(PACKSEQ_ARCHITECTURES "${CMAKE_CUDA_ARCHITECTURES}")
endif()
configure_file(${CMAKE_CURRENT_LIST_DIR}/build_config.h.in ${PROJECT_BINARY_DIR}/config/core/build_config.h @ONLY)
