#![forbid(unsafe_code)]
//! The KVM requests that bulkhead-vcpu makes, by their numbers in linux/kvm.h (x86-64).
//!
//! Not here, so that a process that was taken over cannot use them: device assignment, nested state, guest
//! debugging, memory encryption, dirty logs and rings, and everything of other architectures. Machines are made after
//! the lock-in (a reset makes a new one), hence the requests that make and set up a machine.

/// The hottest first: the filter compares in this order.
pub(super) const REQUESTS: [u32; 25] = [
    0xae80,      // KVM_RUN
    0x4090_ae82, // KVM_SET_REGS
    0x8138_ae83, // KVM_GET_SREGS
    0x4138_ae84, // KVM_SET_SREGS
    0xc008_ae88, // KVM_GET_MSRS
    0x4008_ae89, // KVM_SET_MSRS
    0x4020_aea5, // KVM_SIGNAL_MSI
    0x4020_ae76, // KVM_IRQFD
    0x4040_ae79, // KVM_IOEVENTFD
    0x4008_ae6a, // KVM_SET_GSI_ROUTING
    0x4020_ae46, // KVM_SET_USER_MEMORY_REGION
    0x4008_ae90, // KVM_SET_CPUID2
    0xaea3,      // KVM_GET_TSC_KHZ
    0x4068_aea3, // KVM_ENABLE_CAP
    0x4188_aec6, // KVM_X86_SET_MSR_FILTER
    0xae41,      // KVM_CREATE_VCPU
    0xae60,      // KVM_CREATE_IRQCHIP
    0xae47,      // KVM_SET_TSS_ADDR
    0x4018_aee1, // KVM_SET_DEVICE_ATTR (a vCPU's TSC offset)
    0x4018_aee3, // KVM_HAS_DEVICE_ATTR
    0xae00,      // KVM_GET_API_VERSION
    0xae01,      // KVM_CREATE_VM
    0xae03,      // KVM_CHECK_EXTENSION
    0xae04,      // KVM_GET_VCPU_MMAP_SIZE
    0xc008_ae05, // KVM_GET_SUPPORTED_CPUID
];
