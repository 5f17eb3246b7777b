// One CUDA device for a torch that was built without CUDA: enough for tensors that have no numbers.
//
// A fake CUDA tensor dispatches to Python, so no kernel is needed. But torch's C++ asks four things about the device
// behind the tensor's back. Preloaded (LD_PRELOAD), this library answers them; registrations run when it is loaded,
// before Python imports torch.

#include <optional>

#include <ATen/SDPBackend.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/transformers/attention.h>
#include <c10/core/DeviceType.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

using c10::Device;
using c10::DeviceIndex;
using c10::DeviceType;
using c10::Stream;

// 1. Autograd asks which accelerator there is, to choose the streams of its nodes. The CPU build answers "none", which
//    fails for a CUDA tensor. This definition is found before that of libtorch_cpu.
namespace at::accelerator {
__attribute__((visibility("default"))) std::optional<DeviceType> getAccelerator(bool) {
  return DeviceType::CUDA;
}
}  // namespace at::accelerator

// 2. Every operator call and every node of autograd sets and restores the current device and stream through the guard
//    that is registered for the device type. This one knows device 0 and its default stream, and does nothing.
struct PlayedGuard final : c10::impl::NoOpDeviceGuardImpl<DeviceType::CUDA> {
  static Device device() {
    return Device(DeviceType::CUDA, 0);
  }
  Device getDevice() const override {
    return device();
  }
  Device exchangeDevice(Device) const override {
    return device();
  }
  Stream getStream(Device) const noexcept override {
    return Stream(Stream::DEFAULT, device());
  }
  Stream exchangeStream(Stream) const noexcept override {
    return Stream(Stream::DEFAULT, device());
  }
  // Autograd's synchronization of streams: there is one stream, so nothing is to be done.
  void record(void**, const Stream&, const DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override {
    return true;
  }
};
C10_REGISTER_GUARD_IMPL(CUDA, PlayedGuard)

// 3. Operators choose their implementation by what CUDA and cuDNN can do: convolution and batch normalization must be
//    cuDNN's here too, because what they save for the backward pass is counted as memory.
namespace at {
struct CUDAHooks final : CUDAHooksInterface {
  CUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override {
    return true;
  }
  bool isAvailable() const override {
    return true;
  }
  bool hasCUDA() const override {
    return true;
  }
  bool hasCUDART() const override {
    return true;
  }
  bool hasPrimaryContext(DeviceIndex) const override {
    return true;
  }
  bool hasCuDNN() const override {
    return true;
  }
  bool compiledWithCuDNN() const override {
    return true;
  }
  bool supportsDilatedConvolutionWithCuDNN() const override {
    return true;
  }
  bool supportsDepthwiseConvolutionWithCuDNN() const override {
    return true;
  }
  bool supportsBFloat16ConvolutionWithCuDNNv8() const override {
    return true;
  }
  long versionCuDNN() const override {
    return 92000;
  }
  long versionRuntimeCuDNN() const override {
    return 92000;
  }
  double batchnormMinEpsilonCuDNN() const override {
    return 1e-5;
  }
  int getNumGPUs() const override {
    return 1;
  }
  DeviceIndex deviceCount() const override {
    return 1;
  }
  DeviceIndex getCurrentDevice() const override {
    return 0;
  }
  DeviceIndex current_device() const override {
    return 0;
  }
  DeviceIndex exchangeDevice(DeviceIndex) const override {
    return 0;
  }
  DeviceIndex maybeExchangeDevice(DeviceIndex) const override {
    return 0;
  }
};
REGISTER_CUDA_HOOKS(CUDAHooks)
}  // namespace at

// 4. Attention asks for the best of its implementations. Without an answer it would take products and softmax one by one,
//    whose matrices are larger than all else that a vision transformer holds.
namespace at::native {
static int64_t best_attention(
    const Tensor& query, const Tensor&, const Tensor&, const std::optional<Tensor>& mask, double, bool,
    std::optional<double>, bool) {
  const bool is_flash = query.element_size() == 2 && !(mask.has_value() && mask->defined());
  return static_cast<int64_t>(is_flash ? SDPBackend::flash_attention : SDPBackend::efficient_attention);
}
REGISTER_CUDA_DISPATCH(_fused_sdp_choice_stub, &best_attention)
}  // namespace at::native
