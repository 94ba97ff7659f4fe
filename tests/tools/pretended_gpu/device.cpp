// A CUDA device for a build of PyTorch that has none: see the package's docstring.
//
// Its tensors say `cuda:N`, their memory is the host's, and a boxed fallback for the dispatch key CUDA has each operation
// done by the CPU's kernel on the same memory. Nothing above that key is touched, so autograd with its threads, views,
// autocast, hooks and subclasses are PyTorch's own. Registered are what PyTorch asks of a device: an allocator, a guard,
// hooks. The names of its C++ interfaces are those of torch 2.13 (`constraints.txt`).
#include <ATen/DeviceAccelerator.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/DispatchStub.h>
#include <ATen/native/TensorFactories.h>
#include <ATen/native/transformers/attention.h>
#include <ATen/native/transformers/sdp_utils_cpp.h>
#include <ATen/ops/_fused_sdp_choice.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/_scaled_dot_product_flash_attention_for_cpu.h>
#include <ATen/ops/_scaled_dot_product_flash_attention_for_cpu_backward.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/alloc_cpu.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/library.h>

#include <array>
#include <atomic>
#include <cstring>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

using at::Tensor;
using c10::Device;
using c10::DeviceIndex;
using c10::DeviceType;
using c10::DispatchKey;
using c10::DispatchKeySet;
using c10::IValue;

namespace {

constexpr DeviceIndex DEVICES = 2;
thread_local DeviceIndex current_device = 0;

// ---- what is counted

std::mutex lock;
std::atomic<int64_t> launches{0};
std::map<std::string, int64_t> operations, waits;  // under the lock
using Callback = pybind11::object;  // with the interpreter's lock, which also guards the variable
Callback& on_operation = *new Callback;  // never destroyed, as the interpreter ends before this library
Callback& on_wait = *new Callback;

void count(std::map<std::string, int64_t>& counts, const std::string& name, const Callback& callback) {
  {
    std::lock_guard<std::mutex> guard(lock);
    counts[name]++;
  }
  if (callback && !callback.is_none()) {
    pybind11::gil_scoped_acquire interpreter;
    if (!callback.is_none()) callback(name);
  }
}

void note(const std::string& name) {
  launches++;
  count(operations, name, on_operation);
}

void note_wait(const std::string& name) { count(waits, name, on_wait); }

// ---- memory

struct Card {
  std::atomic<int64_t> taken{0}, most{0}, limit{INT64_MAX};
};
std::array<Card, DEVICES> cards;

void take(DeviceIndex index, int64_t size) {
  Card& card = cards[index];
  const int64_t taken = card.taken += size;
  if (taken > card.limit) {
    card.taken -= size;
    TORCH_CHECK_WITH(
        OutOfMemoryError, false, "CUDA out of memory. Tried to allocate ", size, " bytes on cuda:", int(index), ", of whose ",
        card.limit.load(), " bytes ", taken - size, " are taken (a pretended GPU)");
  }
  int64_t most = card.most;
  while (taken > most && !card.most.compare_exchange_weak(most, taken)) {
  }
}

struct HostAllocator final : c10::Allocator {
  struct Block {
    void* data;
    int64_t size;
    DeviceIndex index;
  };

  c10::DataPtr allocate(size_t size) override {
    const Device device(DeviceType::CUDA, current_device);
    if (!size) return {nullptr, device};
    take(device.index(), size);
    auto* block = new Block{c10::alloc_cpu(size), int64_t(size), device.index()};
    return {block->data, block, &release, device};
  }

  static void release(void* context) {
    auto* block = static_cast<Block*>(context);
    cards[block->index].taken -= block->size;
    c10::free_cpu(block->data);
    delete block;
  }

  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, size_t count) const override { std::memcpy(to, from, count); }
};

HostAllocator allocator;
[[maybe_unused]] const bool allocator_is_set = [] {
  c10::SetAllocator(DeviceType::CUDA, &allocator);
  return true;
}();

// ---- the device, as PyTorch asks for it. Work is done when the call returns, so streams and events are without effect.

struct Guard final : c10::impl::DeviceGuardImplInterface {
  DeviceType type() const override { return DeviceType::CUDA; }
  Device exchangeDevice(Device device) const override {
    return Device(DeviceType::CUDA, std::exchange(current_device, device.index()));
  }
  Device getDevice() const override { return Device(DeviceType::CUDA, current_device); }
  void setDevice(Device device) const override { current_device = device.index(); }
  void uncheckedSetDevice(Device device) const noexcept override { current_device = device.index(); }
  c10::Stream getStream(Device device) const override { return c10::Stream(c10::Stream::DEFAULT, device); }
  c10::Stream getDefaultStream(Device device) const override { return c10::Stream(c10::Stream::DEFAULT, device); }
  c10::Stream exchangeStream(c10::Stream stream) const override { return stream; }
  DeviceIndex deviceCount() const noexcept override { return DEVICES; }
  void record(void**, const c10::Stream&, const DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void recordDataPtrOnStream(const c10::DataPtr&, const c10::Stream&) const override {}
};

C10_REGISTER_GUARD_IMPL(CUDA, Guard)

DeviceIndex get_current_device() { return current_device; }

}  // namespace

namespace at {

struct PretendedHooks final : CUDAHooksInterface {
  explicit PretendedHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex current_device() const override { return get_current_device(); }
  DeviceIndex deviceCount() const override { return DEVICES; }
  DeviceIndex getCurrentDevice() const override { return get_current_device(); }
  int getNumGPUs() const override { return DEVICES; }
  Allocator* getPinnedMemoryAllocator() const override { return c10::GetAllocator(DeviceType::CPU); }
  Allocator* getCUDADeviceAllocator() const override { return c10::GetAllocator(DeviceType::CUDA); }
  void deviceSynchronize(DeviceIndex) const override {}
  const Generator& getDefaultGenerator(DeviceIndex = -1) const override {
    return at::globalContext().defaultGenerator(DeviceType::CPU);
  }
};

C10_REGISTER_TYPED_CLASS(CUDAHooksRegistry, "CUDAHooks", PretendedHooks)

// A build without CUDA says at compile time that there is no accelerator, and the autograd engine then starts no thread
// for one. This is found before the original, as this library is loaded before libtorch.
namespace accelerator {
__attribute__((visibility("default"))) std::optional<DeviceType> getAccelerator(bool) { return DeviceType::CUDA; }
}  // namespace accelerator

}  // namespace at

namespace {

// ---- the host's view of a tensor on the device, and the other way round: the same memory

Tensor remade(const Tensor& like, c10::Storage storage, DispatchKey key) {
  Tensor made = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), DispatchKeySet(key), like.dtype());
  auto* impl = made.unsafeGetTensorImpl();
  impl->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  if (like.unsafeGetTensorImpl()->is_wrapped_number()) impl->set_wrapped_number(true);
  made._set_conj(like.is_conj());
  made._set_neg(like.is_neg());
  return made;
}

Tensor on_host(const Tensor& tensor) {
  if (!tensor.defined() || !tensor.is_cuda()) return tensor;
  const c10::Storage& storage = tensor.storage();
  c10::DataPtr data(
      const_cast<void*>(storage.data()), new c10::Storage(storage),
      [](void* held) { delete static_cast<c10::Storage*>(held); }, Device(DeviceType::CPU));
  c10::Storage view(c10::Storage::use_byte_size_t(), storage.nbytes(), std::move(data), c10::GetCPUAllocator(), true);
  return remade(tensor, std::move(view), DispatchKey::CPU);
}

struct Lent {
  c10::Storage storage;
  int64_t size;
  DeviceIndex index;
};

void give_back(void* context) {
  auto* lent = static_cast<Lent*>(context);
  cards[lent->index].taken -= lent->size;
  delete lent;
}

Tensor on_device(const Tensor& tensor, DeviceIndex index) {
  if (!tensor.defined() || tensor.is_cuda()) return tensor;
  const c10::Storage& storage = tensor.storage();
  const int64_t size = storage.nbytes();
  take(index, size);
  c10::DataPtr data(
      const_cast<void*>(storage.data()), new Lent{storage, size, index}, &give_back, Device(DeviceType::CUDA, index));
  c10::Storage view(c10::Storage::use_byte_size_t(), size, std::move(data), &allocator, true);
  return remade(tensor, std::move(view), DispatchKey::CUDA);
}

// ---- every kernel

const std::set<std::string> MAY_MIX = {  // a host's indices into a device's tensor
    "aten::_index_put_impl_", "aten::index_put_", "aten::index_put", "aten::index", "aten::_unsafe_index",
};
const std::set<std::string> WAITS = {  // the size of the result, or the result itself, is for the host to know
    "aten::_local_scalar_dense", "aten::equal",       "aten::nonzero",  "aten::masked_select",
    "aten::_unique2",            "aten::unique_dim",  "aten::bincount", "aten::unique_consecutive",
    "aten::repeat_interleave",   "aten::_linalg_svd", "aten::argwhere", "aten::linalg_qr",
    "aten::histc",
};

template <class F>
void for_tensors(const IValue& value, F&& f) {
  if (value.isTensor()) {
    if (value.toTensor().defined()) f(value.toTensor());
  } else if (value.isList()) {
    for (const IValue& item : value.toListRef()) for_tensors(item, f);
  }
}

template <class F>
IValue map_tensors(const IValue& value, F&& f) {
  if (value.isTensor()) return value.toTensor().defined() ? IValue(f(value.toTensor())) : value;
  if (value.isTensorList()) {
    c10::List<Tensor> list;
    for (const Tensor& item : value.toTensorVector()) list.push_back(f(item));
    return list;
  }
  if (value.isOptionalTensorList()) {
    c10::List<std::optional<Tensor>> list;
    for (const std::optional<Tensor>& item : value.toOptionalTensorVector()) {
      list.push_back(item && item->defined() ? std::optional<Tensor>(f(*item)) : item);
    }
    return list;
  }
  return value;
}

// Where an operation with these arguments runs. Refused as CUDA would: tensors of two devices, but for single numbers.
DeviceIndex place_of(const std::string& name, const std::vector<IValue>& arguments) {
  int index = -1, other = -1;
  bool has_host = false;
  for (const IValue& value : arguments) {
    for_tensors(value, [&](const Tensor& tensor) {
      if (!tensor.is_cuda()) {
        has_host |= tensor.dim() > 0;
      } else if (index >= 0 && index != tensor.device().index()) {
        other = tensor.device().index();
      } else {
        index = tensor.device().index();
      }
    });
    if (value.isDevice() && value.toDevice().is_cuda() && index < 0) {
      index = value.toDevice().has_index() ? value.toDevice().index() : current_device;
    }
  }
  if (index < 0) index = current_device;
  TORCH_CHECK(
      other < 0, "Expected all tensors to be on the same device, but found at least two devices, cuda:", index,
      " and cuda:", other, "! (", name, ")");
  if (has_host) {
    TORCH_CHECK(
        MAY_MIX.count(name), "Expected all tensors to be on the same device, but found at least two devices, cuda:", index,
        " and cpu! (", name, ")");
    TORCH_CHECK(
        arguments[0].toTensor().is_cuda(),
        "indices should be either on cpu or on the same device as the indexed tensor (cpu)");
    note_wait(name + " (indices on the host)");
  }
  return index;
}

void note_call(const std::string& name, const std::vector<IValue>& arguments) {
  note(name);
  if (WAITS.count(name)) note_wait(name);
  if (name != "aten::index" || !arguments[1].isOptionalTensorList()) return;
  for (const std::optional<Tensor>& item : arguments[1].toOptionalTensorVector()) {
    if (item && item->defined() && (item->scalar_type() == at::kBool || item->scalar_type() == at::kByte)) {
      note_wait("aten::index (by a mask)");
    }
  }
}

using Views = std::vector<std::pair<Tensor, Tensor>>;  // a tensor on the device, and the host's view of it

// What an operation on its arguments has made of their shape or memory.
void take_over(const Views& views, DeviceIndex index) {
  for (const auto& [device, host] : views) {
    auto* impl = device.unsafeGetTensorImpl();
    if (host.storage().data() != device.storage().data()) {
      impl->set_storage_keep_dtype(on_device(host, index).storage());
    }
    if (host.sizes() != device.sizes() || host.strides() != device.strides()) {
      impl->set_sizes_and_strides(host.sizes(), host.strides(), host.storage_offset());
    }
  }
}

Tensor result_of(const Tensor& tensor, const Views& views, DeviceIndex index) {
  if (tensor.is_cuda()) return tensor;
  for (const auto& [device, host] : views) {
    if (tensor.is_same(host)) return device;
    if (tensor.storage().unsafeGetStorageImpl() != host.storage().unsafeGetStorageImpl()) continue;
    if (tensor.dtype() != device.dtype()) return remade(tensor, device.storage(), DispatchKey::CUDA);
    return at::native::as_strided_tensorimpl(device, tensor.sizes(), tensor.strides(), tensor.storage_offset());
  }
  return on_device(tensor, index);
}

void run(const c10::OperatorHandle& operation, torch::jit::Stack* stack) {
  const c10::FunctionSchema& schema = operation.schema();
  const size_t count = schema.arguments().size();
  const std::vector<IValue> arguments(stack->end() - count, stack->end());
  const std::string& name = operation.operator_name().name;
  const DeviceIndex index = place_of(name, arguments);
  note_call(name, arguments);

  Views views;
  const auto view = [&](const Tensor& tensor) {
    if (!tensor.is_cuda()) return tensor;
    for (const auto& [device, host] : views) {
      if (device.is_same(tensor)) return host;
    }
    views.emplace_back(tensor, on_host(tensor));
    return views.back().second;
  };
  torch::jit::drop(*stack, count);
  for (const IValue& value : arguments) {
    const bool is_device = value.isDevice() && value.toDevice().is_cuda();
    stack->push_back(is_device ? IValue(Device(DeviceType::CPU)) : map_tensors(value, view));
  }
  operation.callBoxed(stack);
  take_over(views, index);

  const size_t results = schema.returns().size(), first = stack->size() - results;
  for (size_t i = 0; i < results; i++) {
    IValue& result = (*stack)[first + i];
    const c10::AliasInfo* alias = schema.returns()[i].alias_info();
    if (!alias || !alias->isWrite() || !result.isTensor()) {
      result = map_tensors(result, [&](const Tensor& tensor) { return result_of(tensor, views, index); });
      continue;
    }
    for (size_t j = 0; j < count; j++) {  // an operation in place returns the argument that it wrote to
      const c10::AliasInfo* source = schema.arguments()[j].alias_info();
      if (source && *source == *alias && arguments[j].isTensor()) result = arguments[j];
    }
  }
}

// ---- what is no kernel of the CPU's

Tensor empty(
    c10::IntArrayRef size, std::optional<c10::ScalarType> dtype, std::optional<c10::Layout>, std::optional<Device> device,
    std::optional<bool>, std::optional<c10::MemoryFormat> format) {
  const c10::DeviceGuard guard(device.value_or(Device(DeviceType::CUDA, current_device)));
  return at::detail::empty_generic(
      size, &allocator, DispatchKeySet(DispatchKey::CUDA), c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(
    c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<c10::ScalarType> dtype, std::optional<c10::Layout>,
    std::optional<Device> device, std::optional<bool>) {
  const c10::DeviceGuard guard(device.value_or(Device(DeviceType::CUDA, current_device)));
  return at::detail::empty_strided_generic(
      size, stride, &allocator, DispatchKeySet(DispatchKey::CUDA), c10::dtype_or_default(dtype));
}

Tensor& copy(Tensor& self, const Tensor& source, bool non_blocking) {
  const bool to = self.is_cuda(), from = source.is_cuda();
  const std::string name = to && from ? "copy" : to ? "copy to the device" : "copy to the host";
  note(name);
  if (to != from && !non_blocking) note_wait(name);
  on_host(self).copy_(on_host(source));
  return self;
}

Tensor& set_storage(Tensor& self, c10::Storage source, int64_t offset, c10::IntArrayRef size, c10::IntArrayRef stride) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(source));
  if (stride.size() == size.size()) {
    impl->set_sizes_and_strides(size, stride, offset);
  } else {
    impl->set_storage_offset(offset);
    impl->set_sizes_contiguous(size);
  }
  return self;
}

Tensor as_strided(
    const Tensor& self, c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<int64_t> offset) {
  return at::native::as_strided_tensorimpl(self, size, stride, offset);
}

Tensor view(const Tensor& self, c10::IntArrayRef size) { return at::native::view(self, size); }

Tensor reshape_alias(const Tensor& self, c10::IntArrayRef size, c10::IntArrayRef stride) {
  return at::native::_reshape_alias(self, size, stride);
}

Tensor unfold(const Tensor& self, int64_t dimension, int64_t size, int64_t step) {
  return at::native::unfold(self, dimension, size, step);
}

void record_stream(Tensor&, c10::Stream) {}

// Fused attention is one operation, as on a GPU, and saves as much for backward; inside it is the CPU's.

int64_t choose_attention(
    const Tensor& query, const Tensor& key, const Tensor& value, const std::optional<Tensor>& mask, double dropout,
    bool is_causal, std::optional<double> scale, bool enable_gqa) {
  const int64_t on_cpu = at::_fused_sdp_choice(
      on_host(query), on_host(key), on_host(value), mask ? std::optional<Tensor>(on_host(*mask)) : mask, dropout,
      is_causal, scale, enable_gqa);
  const bool is_fused = on_cpu == int64_t(at::SDPBackend::flash_attention) && !(mask && mask->requires_grad());
  return int64_t(is_fused ? at::SDPBackend::efficient_attention : at::SDPBackend::math);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attend(
    const Tensor& query, const Tensor& key, const Tensor& value, const std::optional<Tensor>& mask, bool, double dropout,
    bool is_causal, std::optional<double> scale) {
  note("aten::_scaled_dot_product_efficient_attention");
  const DeviceIndex index = query.device().index();
  const auto [output, sums] = at::_scaled_dot_product_flash_attention_for_cpu(
      on_host(query), on_host(key), on_host(value), dropout, is_causal,
      mask ? std::optional<Tensor>(on_host(*mask)) : mask, scale);
  const Tensor seed = on_device(at::empty({}, at::kLong), index);
  return {on_device(output, index), on_device(sums, index), seed, seed};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attend_backward(
    const Tensor& gradient, const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& mask,
    const Tensor& output, const Tensor& sums, const Tensor&, const Tensor&, double dropout, std::array<bool, 4>,
    bool is_causal, std::optional<double> scale) {
  note("aten::_scaled_dot_product_efficient_attention_backward");
  const DeviceIndex index = query.device().index();
  const auto [of_query, of_key, of_value] = at::_scaled_dot_product_flash_attention_for_cpu_backward(
      on_host(gradient), on_host(query), on_host(key), on_host(value), on_host(output), on_host(sums), dropout, is_causal,
      mask.defined() ? std::optional<Tensor>(on_host(mask)) : std::nullopt, scale);
  return {on_device(of_query, index), on_device(of_key, index), on_device(of_value, index), Tensor()};
}

TORCH_LIBRARY_IMPL(_, CUDA, library) { library.fallback(torch::CppFunction::makeFromBoxedFunction<&run>()); }

TORCH_LIBRARY_IMPL(aten, CUDA, library) {
  library.impl("empty.memory_format", &empty);
  library.impl("empty_strided", &empty_strided);
  library.impl("copy_", &copy);
  library.impl("set_.source_Storage_storage_offset", &set_storage);
  library.impl("set_.source_Storage", [](Tensor& self, c10::Storage source) -> Tensor& {  // as torch.save does
    const int64_t size = source.nbytes() / self.element_size();
    return set_storage(self, std::move(source), 0, {size}, {});
  });
  library.impl("as_strided", &as_strided);
  library.impl("view", &view);
  library.impl("_reshape_alias", &reshape_alias);
  library.impl("unfold", &unfold);
  library.impl("record_stream", &record_stream);
  library.impl("_scaled_dot_product_efficient_attention", &attend);
  library.impl("_scaled_dot_product_efficient_attention_backward", &attend_backward);
  // Otherwise these are composed of what only CUDA has.
  library.impl("convolution", torch::CppFunction::makeFromBoxedFunction<&run>());
  library.impl("convolution_backward", torch::CppFunction::makeFromBoxedFunction<&run>());
}

// Otherwise it is composed, and right; the CPU's own is wrong for rows of no multiple of a block's length, as those of the
// tests' models are.
TORCH_LIBRARY_IMPL(bitsandbytes, CUDA, library) {
  library.impl("dequantize_4bit", torch::CppFunction::makeFromBoxedFunction<&run>());
}

}  // namespace

namespace at::native {
REGISTER_CUDA_DISPATCH(_fused_sdp_choice_stub, &choose_attention)
}

// What each function does: device.pyi.
PYBIND11_MODULE(device, module) {
  using pybind11::arg;
  module.def("launches", [] { return launches.load(); });
  module.def("operations", [] {
    std::lock_guard<std::mutex> guard(lock);
    return operations;
  });
  module.def("waits", [] {
    std::lock_guard<std::mutex> guard(lock);
    return waits;
  });
  module.def("note_wait", &note_wait);
  module.def("on_operation", [](Callback callback) { on_operation = std::move(callback); });
  module.def("on_wait", [](Callback callback) { on_wait = std::move(callback); });
  module.def("bytes_now", [](int index) { return cards.at(index).taken.load(); }, arg("index") = 0);
  module.def("bytes_most", [](int index) { return cards.at(index).most.load(); }, arg("index") = 0);
  module.def("bytes_limit", [](int index) { return cards.at(index).limit.load(); }, arg("index") = 0);
  module.def("limit", [](int64_t size, int index) { cards.at(index).limit = size; }, arg("size"), arg("index") = 0);
  module.def("current_device", &get_current_device);
  module.def("reset", [] {
    std::lock_guard<std::mutex> guard(lock);
    launches = 0;
    operations.clear();
    waits.clear();
    for (Card& card : cards) card.most = card.taken.load();
  });
}
