// Lets PyTorch trace forward and backward for device "cuda" where there is none: a device guard that does nothing, and
// CUDA hooks that answer "built, one device, no context". Nothing runs: a real tensor on "cuda" still fails.
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/Stream.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace {

using namespace c10;

const Device device(DeviceType::CUDA, 0);
const Stream stream(Stream::DEFAULT, device);

struct Guard final : impl::DeviceGuardImplInterface {
  DeviceType type() const override { return DeviceType::CUDA; }
  Device exchangeDevice(Device) const override { return device; }
  Device getDevice() const override { return device; }
  void setDevice(Device) const override {}
  void uncheckedSetDevice(Device) const noexcept override {}
  Stream getStream(Device) const override { return stream; }
  Stream getDefaultStream(Device) const override { return stream; }
  Stream getNewStream(Device, int) const override { return stream; }
  Stream exchangeStream(Stream) const override { return stream; }
  DeviceIndex deviceCount() const noexcept override { return 1; }
};

struct Hooks final : at::CUDAHooksInterface {
  bool isBuilt() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return false; }
};

// A pointer to a virtual member holds 1 + its offset in the table (Itanium C++ ABI, 2.3).
template <class Member>
size_t slot(Member member) {
  union {
    Member member;
    ptrdiff_t offset;
  } parts{member};
  return static_cast<size_t>(parts.offset - 1) / sizeof(void*);
}

}  // namespace

extern "C" void pretend() {
  static Guard guard;
  static Hooks hooks;
  impl::device_guard_impl_registry[static_cast<size_t>(DeviceType::CUDA)].store(&guard);
  // The hooks that are there keep all their answers but three.
  constexpr size_t kSlots = 96, kBefore = 2;  // more than there are; what lies before a table's first member
  static void* table[kBefore + kSlots];
  auto*** live = reinterpret_cast<void***>(const_cast<at::CUDAHooksInterface*>(&at::detail::getCUDAHooks()));
  auto** mine = *reinterpret_cast<void***>(&hooks);
  for (size_t i = 0; i < kBefore + kSlots; i++) table[i] = (*live - kBefore)[i];
  using H = at::CUDAHooksInterface;
  for (size_t i : {slot(&H::isBuilt), slot(&H::hasCUDA), slot(&H::hasPrimaryContext)}) table[kBefore + i] = mine[i];
  *live = table + kBefore;
}
