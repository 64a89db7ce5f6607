#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstring>
#include <deque>
#include <memory>
#include <vector>

struct CUstream_st {
  std::deque<std::function<bool()>> tasks;
  unsigned long long capture = 0;
};

struct CUevent_st {
  std::shared_ptr<bool> reached = std::make_shared<bool>(true);
};

namespace {

std::vector<cudaStream_t> streams;
cudaError_t sticky_error = cudaSuccess;

void advance() {
  for (bool moved = true; moved;) {
    moved = false;
    for (const cudaStream_t stream : streams) {
      while (!stream->tasks.empty() && stream->tasks.front()()) {
        stream->tasks.pop_front();
        moved = true;
      }
    }
  }
}

}  // namespace

namespace fake_cuda {

std::mutex& mutex() {
  static std::mutex one;
  return one;
}

void enqueue(cudaStream_t stream, std::function<bool()> task) {
  const std::lock_guard lock(mutex());
  stream->tasks.push_back(std::move(task));
}

void set_capture(cudaStream_t stream, unsigned long long id) {
  const std::lock_guard lock(mutex());
  stream->capture = id;
}

void set_error(cudaError_t error) {
  const std::lock_guard lock(mutex());
  sticky_error = error;
}

}  // namespace fake_cuda

cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
cudaError_t cudaSetDevice(int) { return cudaSuccess; }
cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t) { return "a made-up error"; }
cudaError_t cudaDeviceGetStreamPriorityRange(int* lowest, int* highest) {
  return *lowest = 0, *highest = -5, cudaSuccess;
}
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode*) { return cudaSuccess; }

cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned, int) {
  const std::lock_guard lock(fake_cuda::mutex());
  streams.push_back(*stream = new CUstream_st);
  return cudaSuccess;
}

cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  const std::lock_guard lock(fake_cuda::mutex());
  advance();
  std::erase(streams, stream);
  delete stream;
  return cudaSuccess;
}

cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, cudaStreamCaptureStatus* status, unsigned long long* id) {
  const std::lock_guard lock(fake_cuda::mutex());
  *status = stream->capture != 0 ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  *id = stream->capture;
  return cudaSuccess;
}

cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  fake_cuda::enqueue(stream, [reached = event->reached] { return *reached; });
  return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t stream) {
  fake_cuda::enqueue(stream, [=] { return std::memcpy(to, from, bytes), true; });
  return cudaSuccess;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) { return *event = new CUevent_st, cudaSuccess; }

cudaError_t cudaEventDestroy(cudaEvent_t event) { return delete event, cudaSuccess; }

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  event->reached = std::make_shared<bool>(false);
  fake_cuda::enqueue(stream, [reached = event->reached] { return *reached = true; });
  return cudaSuccess;
}

cudaError_t cudaEventQuery(cudaEvent_t event) {
  const std::lock_guard lock(fake_cuda::mutex());
  if (sticky_error != cudaSuccess) return sticky_error;
  advance();
  return *event->reached ? cudaSuccess : cudaErrorNotReady;
}
