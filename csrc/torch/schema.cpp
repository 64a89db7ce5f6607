// Every operator of the library, in one place.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(packseq, m) {
  // csrc/torch/attention.cpp; dsinks is empty where sinks is None
  m.def(
      "attention(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, Tensor? cu_seqlens_k=None, bool causal=False, "
      "int window_left=-1, int window_right=-1, int sink_tokens=0, float softcap=0, Tensor? alibi_slopes=None, "
      "Tensor? sinks=None, float? scale=None)"
      " -> (Tensor out, Tensor lse)");
  m.def(
      "attention_backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
      "Tensor cu_seqlens, Tensor? cu_seqlens_k, bool causal, int window_left, int window_right, int sink_tokens, "
      "float softcap, Tensor? alibi_slopes, Tensor? sinks, float? scale)"
      " -> (Tensor dq, Tensor dk, Tensor dv, Tensor dsinks)");

  // csrc/torch/packing.cpp; one of mask and lengths is given; places are indices (int64) or cu_seqlens (int32)
  m.def(
      "pack(Tensor padded, Tensor? mask, Tensor? lengths, SymInt? capacity=None)"
      " -> (Tensor tokens, Tensor cu_seqlens, Tensor indices)");
  m.def("unpack(Tensor tokens, Tensor places, SymInt batch, SymInt length, Tensor? fill=None) -> Tensor padded");
  m.def("unpack_backward(Tensor dpadded, Tensor places, SymInt capacity) -> Tensor dtokens");
}
