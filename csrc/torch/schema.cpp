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

  // The same for keys that come in parts: csrc/attention/attention.h has what sums, delta, add_to_keys and positions
  // are. attention_finish overwrites out, in whose dtype the results are, and lse.
  m.def(
      "attention_accumulate(Tensor q, Tensor k, Tensor v, Tensor(a!) out, Tensor(b!) sums, Tensor cu_seqlens, "
      "Tensor cu_seqlens_k, Tensor positions, bool causal, int window_left, int window_right, int sink_tokens, "
      "float softcap, Tensor? alibi_slopes, float? scale)"
      " -> ()");
  m.def(
      "attention_accumulate_backward(Tensor dout, Tensor delta, Tensor q, Tensor k, Tensor v, Tensor lse, "
      "Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) dv, bool add_to_keys, Tensor cu_seqlens, Tensor cu_seqlens_k, "
      "Tensor positions, bool causal, int window_left, int window_right, int sink_tokens, float softcap, "
      "Tensor? alibi_slopes, float? scale)"
      " -> ()");
  m.def("attention_finish(Tensor total, Tensor sums, Tensor? sinks, Tensor(a!) out, Tensor(b!) lse) -> ()");
  m.def("attention_delta(Tensor dout, Tensor out, Tensor? dlse=None) -> Tensor delta");

  // csrc/torch/scan.cpp; final_states has no rows where they are not returned, gradients are empty where their input is
  // None
  m.def(
      "selective_scan(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor cu_seqlens, Tensor? D=None, "
      "Tensor? z=None, Tensor? delta_bias=None, Tensor? initial_states=None, bool delta_softplus=False, "
      "bool reverse=False, bool return_final_states=False)"
      " -> (Tensor out, Tensor final_states)");
  m.def(
      "selective_scan_backward(Tensor dout, Tensor? dfinal_states, Tensor u, Tensor delta, Tensor A, Tensor B, "
      "Tensor C, Tensor cu_seqlens, Tensor? D, Tensor? z, Tensor? delta_bias, Tensor? initial_states, "
      "bool delta_softplus, bool reverse)"
      " -> (Tensor du, Tensor ddelta, Tensor dA, Tensor dB, Tensor dC, Tensor dD, Tensor dz, Tensor ddelta_bias, "
      "Tensor dinitial_states)");
  m.def(
      "selective_scan_step(Tensor(a!) states, Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, "
      "Tensor cu_seqlens, Tensor? indices=None, Tensor? D=None, Tensor? z=None, Tensor? delta_bias=None, "
      "bool delta_softplus=False)"
      " -> Tensor out");

  // csrc/torch/conv1d.cpp; the same
  m.def(
      "causal_conv1d(Tensor x, Tensor weight, Tensor cu_seqlens, Tensor? bias=None, Tensor? initial_states=None, "
      "bool silu=False, bool reverse=False, bool return_final_states=False)"
      " -> (Tensor out, Tensor final_states)");
  m.def(
      "causal_conv1d_backward(Tensor dout, Tensor? dfinal_states, Tensor x, Tensor weight, Tensor cu_seqlens, "
      "Tensor? bias, Tensor? initial_states, bool silu, bool reverse)"
      " -> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dinitial_states)");
  m.def(
      "causal_conv1d_step(Tensor(a!) states, Tensor x, Tensor weight, Tensor cu_seqlens, Tensor? bias=None, "
      "Tensor? indices=None, bool silu=False)"
      " -> Tensor out");

  // csrc/torch/filters.cpp; v and u are [*groups, *rows, width], w and x [*rows, poles]; dz is empty where it is not
  // wanted
  m.def("cauchy(Tensor v, Tensor z, Tensor w, bool conjugate=False) -> Tensor out");
  m.def(
      "cauchy_backward(Tensor dout, Tensor v, Tensor z, Tensor w, bool conjugate, bool wants_dz)"
      " -> (Tensor dv, Tensor dz, Tensor dw)");
  m.def("vandermonde(Tensor v, Tensor x, SymInt length, bool conjugate=False) -> Tensor out");
  m.def(
      "vandermonde_backward(Tensor dout, Tensor v, Tensor x, SymInt length, bool conjugate)"
      " -> (Tensor dv, Tensor dx)");
  m.def("vandermonde_transpose(Tensor u, Tensor x) -> Tensor out");
  m.def("vandermonde_transpose_backward(Tensor dout, Tensor u, Tensor x) -> (Tensor du, Tensor dx)");
  m.def("s4_spectrum(Tensor w, Tensor B, Tensor C, Tensor dt, SymInt length, Tensor? P=None) -> Tensor out");
  m.def(
      "s4_spectrum_backward(Tensor dout, Tensor w, Tensor B, Tensor C, Tensor dt, SymInt length, Tensor? P)"
      " -> (Tensor dw, Tensor dB, Tensor dC, Tensor ddt, Tensor dP)");

  // csrc/torch/long_conv.cpp; gradients are empty where their input is None
  m.def(
      "long_conv(Tensor u, Tensor k, Tensor cu_seqlens, Tensor? D=None, Tensor? pre_gate=None, Tensor? gate=None, "
      "Tensor? k_after=None, bool reverse=False)"
      " -> Tensor out");
  m.def(
      "long_conv_backward(Tensor dout, Tensor u, Tensor k, Tensor cu_seqlens, Tensor? D, Tensor? pre_gate, "
      "Tensor? gate, Tensor? k_after, bool reverse)"
      " -> (Tensor du, Tensor dk, Tensor dD, Tensor dpre_gate, Tensor dgate, Tensor dk_after)");

  // csrc/torch/s4_step.cpp; out has C's filters between rows and channels, where C has them
  m.def(
      "s4_step(Tensor(a!) states, Tensor u, Tensor w, Tensor B, Tensor C, Tensor dt, Tensor cu_seqlens, "
      "Tensor? indices=None, Tensor? P=None, Tensor? D=None, bool zoh=False)"
      " -> Tensor out");

  // python/packseq/_mamba_inner.py, made of the operators above; x_dbl and y are kept for the backward
  m.def(
      "mamba_inner(Tensor xz, Tensor conv_weight, Tensor? conv_bias, Tensor x_proj_weight, Tensor dt_proj_weight, "
      "Tensor out_proj_weight, Tensor? out_proj_bias, Tensor A, Tensor? D, Tensor? dt_bias, Tensor cu_seqlens, "
      "bool reverse=False)"
      " -> (Tensor out, Tensor x_dbl, Tensor y)");
  m.def(
      "mamba_inner_backward(Tensor dout, Tensor xz, Tensor conv_weight, Tensor? conv_bias, Tensor x_proj_weight, "
      "Tensor dt_proj_weight, Tensor out_proj_weight, Tensor? out_proj_bias, Tensor A, Tensor? D, Tensor? dt_bias, "
      "Tensor cu_seqlens, bool reverse, Tensor x_dbl, Tensor y)"
      " -> (Tensor dxz, Tensor dconv_weight, Tensor dconv_bias, Tensor dx_proj_weight, Tensor ddt_proj_weight, "
      "Tensor dout_proj_weight, Tensor dout_proj_bias, Tensor dA, Tensor dD, Tensor ddt_bias)");

  // python/packseq/ring/: group is a process group's name, key a Sharding's
  m.def("ring_exchange(Tensor[] tensors, str group, int shift, SymInt[]? rows) -> Tensor[]");
  m.def("all_to_all(Tensor x, str group, SymInt[] send_rows, SymInt[] recv_rows) -> Tensor");
  m.def("ring_gather(Tensor x, Tensor key, str group, str what, int number) -> Tensor");
  m.def("ring_sums_beyond(Tensor x, bool before) -> Tensor");
  m.def(
      "ring_pieces(Tensor like, Tensor key, str group, bool reverse)"
      " -> (Tensor cu_seqlens, Tensor sequences, Tensor before)");
  m.def(
      "ring_attention(Tensor q, Tensor k, Tensor v, Tensor key, str group, bool causal, int window_left, "
      "int window_right, int sink_tokens, float softcap, Tensor? alibi_slopes, Tensor? sinks, float? scale)"
      " -> (Tensor out, Tensor lse)");
  m.def(
      "ring_attention_backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
      "Tensor key, str group, bool causal, int window_left, int window_right, int sink_tokens, float softcap, "
      "Tensor? alibi_slopes, Tensor? sinks, float? scale)"
      " -> (Tensor dq, Tensor dk, Tensor dv, Tensor dsinks)");
  m.def("ring_gather_backward(Tensor dout, SymInt rows, Tensor key, str group, str what, int number) -> Tensor");

  // csrc/torch/packing.cpp; one of mask and lengths is given; places are indices (int64) or cu_seqlens (int32)
  m.def(
      "pack(Tensor padded, Tensor? mask, Tensor? lengths, SymInt? capacity=None)"
      " -> (Tensor tokens, Tensor cu_seqlens, Tensor indices)");
  m.def("unpack(Tensor tokens, Tensor places, SymInt batch, SymInt length, Tensor? fill=None) -> Tensor padded");
  m.def("unpack_backward(Tensor dpadded, Tensor places, SymInt capacity) -> Tensor dtokens");
}
