//! Loads and stores: the fast path through cached translations, and everything else.

use crate::{
    Exit,
    cpu::Cpu,
    debug::Watched,
    mmu::{
        self, Access, FSC_ALIGNMENT, FSC_EXTERNAL, Fault, SCTLR_A, SCTLR_SA, SCTLR_SA0, Translation,
    },
    op::Op,
    regs::SP,
    shared::Place,
    tlb::{PAGE_MASK, Regime},
};

/// An integer that is loaded and stored.
pub(crate) trait Scalar: Copy {
    /// Bytes.
    const SIZE: u64;
    fn from_u128(value: u128) -> Self;
    fn to_u128(self) -> u128;
}

macro_rules! scalar {
    ($($t:ty)*) => {$(
        impl Scalar for $t {
            const SIZE: u64 = size_of::<$t>() as u64;
            #[inline(always)]
            fn from_u128(value: u128) -> Self {
                value as $t
            }
            #[inline(always)]
            fn to_u128(self) -> u128 {
                self as u128
            }
        }
    )*};
}
scalar!(u8 u16 u32 u64 u128);

/// Guest memory as one value at any alignment: volatile, since other vCPUs and devices use it too.
#[repr(C, packed)]
#[derive(Clone, Copy)]
struct Unaligned<T>(T);

#[cfg(target_endian = "big")]
compile_error!("guest memory is little-endian and so must the host be");

/// How much is accessed, in bytes.
#[derive(Clone, Copy)]
pub(crate) struct Width {
    pub(crate) size: u64,
    /// What the address is to be a multiple of where alignment counts: less than `size` for a pair.
    pub(crate) align: u64,
}

impl Width {
    const fn of<T: Scalar>() -> Self {
        Self { size: T::SIZE, align: T::SIZE }
    }

    fn is_aligned(self, va: u64) -> bool {
        va & (self.align - 1) == 0
    }
}

/// A load that waits for [`Cpu::complete_mmio_read`], or an MRS for its value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Pending {
    /// Slot of the destination.
    pub(crate) slot: u8,
    /// Bytes that were asked for.
    pub(crate) size: u8,
    /// How the value goes into the register.
    pub(crate) extend: Extend,
}

/// How a loaded value goes into its register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Extend {
    Zero,
    Sign32,
    Sign64,
}

/// What an access leads to.
pub(crate) enum Target {
    /// Bytes of RAM, at this host address.
    Ram(*mut u8),
    /// This guest-physical address, which is not RAM.
    Device(u64),
}

/// Why a load or store did not happen. PC stands at the instruction and an exception has been taken,
/// or behind it with an exit set.
pub(crate) struct Stopped;

impl Cpu {
    /// Answers an [`Exit::MmioRead`] with the low bytes of `value`.
    pub fn complete_mmio_read(&mut self, value: u64) {
        if let Some(Pending { slot, size, extend }) = self.pending.take() {
            let shift = 64 - 8 * u32::from(size);
            let zero = value << shift >> shift;
            let sign = ((value << shift) as i64 >> shift) as u64;
            self.r.x[slot as usize] = match extend {
                Extend::Zero => zero,
                Extend::Sign32 => sign & 0xffff_ffff,
                Extend::Sign64 => sign,
            };
        }
    }

    /// Answers an [`Exit::SysRegRead`].
    pub fn complete_sysreg_read(&mut self, value: u64) {
        self.complete_mmio_read(value);
    }

    /// Translates `va` and checks that `access` is allowed in `regime`.
    pub(crate) fn translate(
        &self,
        va: u64,
        access: Access,
        regime: Regime,
    ) -> Result<Translation, Fault> {
        self.translate_aligned(va, access, regime, true)
    }

    /// As [`translate`](Self::translate) for data that may not be aligned.
    fn translate_aligned(
        &self,
        va: u64,
        access: Access,
        regime: Regime,
        aligned: bool,
    ) -> Result<Translation, Fault> {
        let translation = mmu::walk(&self.sys, &self.shared.ram, va)?;
        if !aligned && translation.is_device() {
            return Err(Fault::Abort(FSC_ALIGNMENT));
        }
        translation.check(&self.sys, access, regime == Regime::El0, regime == Regime::El1Pan)?;
        Ok(translation)
    }

    /// The host address of the `size` bytes at `va`, if reads are known to be allowed and they lie
    /// on one page.
    #[inline(always)]
    pub(crate) fn fast_read(&self, regime: Regime, va: u64, size: u64) -> Option<*mut u8> {
        let entry = self.tlb.data(regime, va);
        if entry.read_tag == self.tlb.tag(va) && va & !PAGE_MASK <= 0x1000 - size {
            Some(entry.addend.wrapping_add(va) as *mut u8)
        } else {
            None
        }
    }

    /// As [`fast_read`](Self::fast_read), for reads and writes.
    #[inline(always)]
    pub(crate) fn fast_write(&self, regime: Regime, va: u64, size: u64) -> Option<*mut u8> {
        let entry = self.tlb.data(regime, va);
        if entry.write_tag == self.tlb.tag(va) && va & !PAGE_MASK <= 0x1000 - size {
            Some(entry.addend.wrapping_add(va) as *mut u8)
        } else {
            None
        }
    }

    /// As [`fast_read`](Self::fast_read), on pages where only aligned accesses are allowed too.
    pub(crate) fn known_read(&self, regime: Regime, va: u64, width: Width) -> Option<*mut u8> {
        let entry = self.tlb.data(regime, va);
        self.known(entry.read_tag, entry.addend, va, width)
    }

    fn known_write(&self, regime: Regime, va: u64, width: Width) -> Option<*mut u8> {
        let entry = self.tlb.data(regime, va);
        self.known(entry.write_tag, entry.addend, va, width)
    }

    fn known(&self, tag: u64, addend: u64, va: u64, width: Width) -> Option<*mut u8> {
        let on_page = va & !PAGE_MASK <= 0x1000 - width.size;
        let aligned = width.is_aligned(va) && tag == self.tlb.tag_aligned(va);
        (on_page && (aligned || tag == self.tlb.tag(va)))
            .then_some(addend.wrapping_add(va) as *mut u8)
    }

    /// Loads from RAM for `op`, which is not able to load from a device.
    #[inline(always)]
    pub(crate) fn load<T: Scalar>(&mut self, op: &Op, va: u64) -> Result<T, Stopped> {
        self.load_in(self.regime, op, va)
    }

    /// Loads two values at once, each of them aligned if it counts.
    #[inline(always)]
    pub(crate) fn load_pair<T: Scalar>(&mut self, op: &Op, va: u64) -> Result<T, Stopped> {
        match self.fast_read(self.regime, va, T::SIZE) {
            // SAFETY: as in `load_in`.
            Some(host) => Ok(unsafe { host.cast::<Unaligned<T>>().read_volatile().0 }),
            None => {
                let width = Width { size: T::SIZE, align: T::SIZE / 2 };
                self.load_slow(self.regime, op, va, width, None).map(T::from_u128)
            }
        }
    }

    #[inline(always)]
    pub(crate) fn load_in<T: Scalar>(
        &mut self,
        regime: Regime,
        op: &Op,
        va: u64,
    ) -> Result<T, Stopped> {
        match self.fast_read(regime, va, T::SIZE) {
            // SAFETY: a matching entry leads to RAM, and all bytes are on its page.
            Some(host) => Ok(unsafe { host.cast::<Unaligned<T>>().read_volatile().0 }),
            None => self.load_slow(regime, op, va, Width::of::<T>(), None).map(T::from_u128),
        }
    }

    /// Loads for `op` into general register `slot`, from RAM or a device.
    #[inline(always)]
    pub(crate) fn load_or_mmio<T: Scalar>(
        &mut self,
        regime: Regime,
        op: &Op,
        va: u64,
        slot: u8,
        extend: Extend,
    ) -> Result<T, Stopped> {
        match self.fast_read(regime, va, T::SIZE) {
            // SAFETY: as in `load_in`.
            Some(host) => Ok(unsafe { host.cast::<Unaligned<T>>().read_volatile().0 }),
            None => {
                let pending = Pending { slot, size: T::SIZE as u8, extend };
                self.load_slow(regime, op, va, Width::of::<T>(), Some(pending)).map(T::from_u128)
            }
        }
    }

    /// Stores to RAM for `op`, which is not able to store to a device.
    #[inline(always)]
    pub(crate) fn store<T: Scalar>(&mut self, op: &Op, va: u64, value: T) -> Result<(), Stopped> {
        self.store_in(self.regime, op, va, value, false)
    }

    /// Stores two values at once, each of them aligned if it counts.
    #[inline(always)]
    pub(crate) fn store_pair<T: Scalar>(
        &mut self,
        op: &Op,
        va: u64,
        value: T,
    ) -> Result<(), Stopped> {
        match self.fast_write(self.regime, va, T::SIZE) {
            Some(host) => {
                // SAFETY: as in `load_in`.
                unsafe { host.cast::<Unaligned<T>>().write_volatile(Unaligned(value)) };
                Ok(())
            }
            None => {
                let width = Width { size: T::SIZE, align: T::SIZE / 2 };
                self.store_slow(self.regime, op, va, width, value.to_u128(), false)
            }
        }
    }

    /// Stores for `op`; to a device too if `mmio`.
    #[inline(always)]
    pub(crate) fn store_in<T: Scalar>(
        &mut self,
        regime: Regime,
        op: &Op,
        va: u64,
        value: T,
        mmio: bool,
    ) -> Result<(), Stopped> {
        match self.fast_write(regime, va, T::SIZE) {
            Some(host) => {
                // SAFETY: as in `load_in`.
                unsafe { host.cast::<Unaligned<T>>().write_volatile(Unaligned(value)) };
                Ok(())
            }
            None => self.store_slow(regime, op, va, Width::of::<T>(), value.to_u128(), mmio),
        }
    }

    /// The host address of `size` bytes at `va` for an atomic access, which must be aligned and in
    /// RAM.
    #[inline(always)]
    pub(crate) fn atomic(&mut self, op: &Op, va: u64, size: u64) -> Result<*mut u8, Stopped> {
        self.atomic_in(op, va, size, Watched::Update)
    }

    /// As [`atomic`](Self::atomic); `kind` says what watchpoints take the access for.
    #[inline(always)]
    pub(crate) fn atomic_in(
        &mut self,
        op: &Op,
        va: u64,
        size: u64,
        kind: Watched,
    ) -> Result<*mut u8, Stopped> {
        if va & (size - 1) == 0
            && let Some(host) = self.fast_write(self.regime, va, size)
        {
            return Ok(host);
        }
        self.atomic_slow(op, va, size, kind)
    }

    #[cold]
    #[inline(never)]
    fn atomic_slow(
        &mut self,
        op: &Op,
        va: u64,
        size: u64,
        kind: Watched,
    ) -> Result<*mut u8, Stopped> {
        if va & (size - 1) != 0 {
            return Err(self.data_fault(op, va, FSC_ALIGNMENT, true));
        }
        if let Some(host) = self.known_write(self.regime, va, Width { size, align: size }) {
            return Ok(host);
        }
        let target = self.page(self.regime, op, va, Access::Write, true)?;
        self.watch(self.regime, op, va, size, kind)?;
        match target {
            Target::Ram(host) => Ok(host),
            Target::Device(_) => Err(self.data_fault(op, va, FSC_EXTERNAL, true)),
        }
    }

    #[cold]
    #[inline(never)]
    fn load_slow(
        &mut self,
        regime: Regime,
        op: &Op,
        va: u64,
        width: Width,
        pending: Option<Pending>,
    ) -> Result<u128, Stopped> {
        let Width { size, .. } = width;
        if let Some(host) = self.known_read(regime, va, width) {
            // SAFETY: a matching entry leads to RAM, and all bytes are on its page.
            return Ok(unsafe { read_host(host, size) });
        }
        let aligned = self.check_alignment(op, va, width, false)?;
        let mut bytes = [0u8; 16];
        let first = size.min(0x1000 - (va & !PAGE_MASK));
        let target = self.page(regime, op, va, Access::Read, aligned)?;
        self.watch(regime, op, va, size, Watched::Load)?;
        let host = match (target, pending) {
            (Target::Ram(host), _) => host,
            (Target::Device(address), Some(_)) if aligned => {
                self.pending = pending;
                self.leave_with(op, Exit::MmioRead { address, size: size as u8 });
                return Err(Stopped);
            }
            (Target::Device(_), _) => return Err(self.data_fault(op, va, FSC_EXTERNAL, false)),
        };
        if first == size {
            // SAFETY: `page` gave the address of a byte in RAM, and all bytes are on its page.
            return Ok(unsafe { read_host(host, size) });
        }
        // SAFETY: as above, for the `first` bytes that are on the page.
        unsafe { copy(host, bytes.as_mut_ptr(), first as usize) };
        let va = va.wrapping_add(first);
        let Target::Ram(host) = self.page(regime, op, va, Access::Read, aligned)? else {
            return Err(self.data_fault(op, va, FSC_EXTERNAL, false));
        };
        // SAFETY: as above, on the next page.
        unsafe { copy(host, bytes.as_mut_ptr().add(first as usize), (size - first) as usize) };
        Ok(u128::from_le_bytes(bytes))
    }

    #[cold]
    #[inline(never)]
    fn store_slow(
        &mut self,
        regime: Regime,
        op: &Op,
        va: u64,
        width: Width,
        value: u128,
        mmio: bool,
    ) -> Result<(), Stopped> {
        let Width { size, .. } = width;
        if let Some(host) = self.known_write(regime, va, width) {
            // SAFETY: a matching entry leads to RAM, and all bytes are on its page.
            unsafe { write_host(host, size, value) };
            return Ok(());
        }
        let aligned = self.check_alignment(op, va, width, true)?;
        let bytes = value.to_le_bytes();
        let first = size.min(0x1000 - (va & !PAGE_MASK));
        let target = self.page(regime, op, va, Access::Write, aligned)?;
        self.watch(regime, op, va, size, Watched::Store)?;
        let host = match target {
            Target::Ram(host) => host,
            Target::Device(address) if mmio && aligned => {
                let exit = Exit::MmioWrite { address, size: size as u8, value: value as u64 };
                self.leave_with(op, exit);
                return Err(Stopped);
            }
            Target::Device(_) => return Err(self.data_fault(op, va, FSC_EXTERNAL, true)),
        };
        if first == size {
            // SAFETY: `page` gave the address of a byte in RAM, and all bytes are on its page.
            unsafe { write_host(host, size, value) };
            return Ok(());
        }
        // Both pages are checked before either is written: a faulting store changes nothing.
        let va = va.wrapping_add(first);
        let Target::Ram(second) = self.page(regime, op, va, Access::Write, aligned)? else {
            return Err(self.data_fault(op, va, FSC_EXTERNAL, true));
        };
        // SAFETY: `first` bytes are on the first page and the others at the start of the second.
        unsafe {
            copy(bytes.as_ptr(), host, first as usize);
            copy(bytes.as_ptr().add(first as usize), second, (size - first) as usize);
        }
        Ok(())
    }

    /// True if `op` may not use the stack pointer as a base: it is not aligned to 16 bytes where
    /// SCTLR_EL1 says that it must be. The exception has been taken then.
    #[inline(always)]
    pub(crate) fn refuse_sp(&mut self, op: &Op) -> bool {
        self.r.x[SP as usize] & 15 != 0 && self.refuse_sp_slow(op)
    }

    #[cold]
    #[inline(never)]
    fn refuse_sp_slow(&mut self, op: &Op) -> bool {
        let checked = if self.pstate.el1() { SCTLR_SA } else { SCTLR_SA0 };
        if self.sys.sctlr & checked == 0 {
            return false;
        }
        self.leave_at(op);
        self.take_sp_alignment();
        true
    }

    /// Whether the access is aligned; a fault if it is not and SCTLR_EL1.A says that all must be.
    fn check_alignment(
        &mut self,
        op: &Op,
        va: u64,
        width: Width,
        write: bool,
    ) -> Result<bool, Stopped> {
        let aligned = width.is_aligned(va);
        if !aligned && self.sys.sctlr & SCTLR_A != 0 {
            return Err(self.data_fault(op, va, FSC_ALIGNMENT, write));
        }
        Ok(aligned)
    }

    /// Translates the page of `va` for `op`, once, and remembers it if it is RAM. An exception has been
    /// taken if the access is not allowed.
    pub(crate) fn page(
        &mut self,
        regime: Regime,
        op: &Op,
        va: u64,
        access: Access,
        aligned: bool,
    ) -> Result<Target, Stopped> {
        let write = access == Access::Write;
        let translation = match self.translate_aligned(va, access, regime, aligned) {
            Ok(translation) => translation,
            Err(Fault::Abort(fsc)) => return Err(self.data_fault(op, va, fsc, write)),
            Err(Fault::Withheld(address)) => return Err(self.withheld(op, address, false)),
        };
        let page = translation.pa & PAGE_MASK;
        let host = match self.shared.ram.place(page, 0x1000, write) {
            Place::Ram(host) => host,
            Place::Withheld => return Err(self.withheld(op, translation.pa, write)),
            Place::Elsewhere => return Ok(Target::Device(translation.pa)),
        };
        // SAFETY: an offset in the page.
        let host = unsafe { host.add((va & !PAGE_MASK) as usize) };
        // An address with a tag in its top byte is not its own page's number: not remembered.
        // Nor is one that holds watched bytes.
        if va == mmu::untagged(va) && !self.sys.watches_page(va) {
            let writable = write || {
                matches!(self.shared.ram.place(page, 0x1000, true), Place::Ram(_))
                    && translation
                        .check(
                            &self.sys,
                            Access::Write,
                            regime == Regime::El0,
                            regime == Regime::El1Pan,
                        )
                        .is_ok()
            };
            let aligned = translation.is_device() || self.sys.sctlr & SCTLR_A != 0;
            self.tlb.fill_data(regime, va, host, writable, aligned, &translation);
        }
        Ok(Target::Ram(host))
    }

    /// Leaves the block at `op`, which is not retired: it is executed again once the access to RAM at
    /// `address` is allowed. Like an abort, an access leaves no trace before it has got all of its pages,
    /// or one that its repetition does not show.
    #[cold]
    pub(crate) fn withheld(&mut self, op: &Op, address: u64, write: bool) -> Stopped {
        self.advance = false;
        self.leave_at(op);
        self.budget += 1;
        self.exit = Some(Exit::Memory { address, write });
        Stopped
    }

    /// Takes a data abort at `op`.
    pub(crate) fn data_fault(&mut self, op: &Op, va: u64, fsc: u32, write: bool) -> Stopped {
        self.leave_at(op);
        self.take_data_abort(va, fsc, write, false);
        Stopped
    }
}

/// Reads a value of `size` bytes in one access.
///
/// # Safety
///
/// `host` is valid for `size` bytes.
unsafe fn read_host(host: *mut u8, size: u64) -> u128 {
    // SAFETY: promised by the caller.
    unsafe {
        match size {
            1 => u128::from(host.read_volatile()),
            2 => u128::from(host.cast::<Unaligned<u16>>().read_volatile().0),
            4 => u128::from(host.cast::<Unaligned<u32>>().read_volatile().0),
            8 => u128::from(host.cast::<Unaligned<u64>>().read_volatile().0),
            _ => host.cast::<Unaligned<u128>>().read_volatile().0,
        }
    }
}

/// Writes the low `size` bytes of `value` in one access.
///
/// # Safety
///
/// `host` is valid for `size` bytes.
unsafe fn write_host(host: *mut u8, size: u64, value: u128) {
    // SAFETY: promised by the caller.
    unsafe {
        match size {
            1 => host.write_volatile(value as u8),
            2 => host.cast::<Unaligned<u16>>().write_volatile(Unaligned(value as u16)),
            4 => host.cast::<Unaligned<u32>>().write_volatile(Unaligned(value as u32)),
            8 => host.cast::<Unaligned<u64>>().write_volatile(Unaligned(value as u64)),
            _ => host.cast::<Unaligned<u128>>().write_volatile(Unaligned(value)),
        }
    }
}

/// Copies bytes to or from guest memory.
///
/// # Safety
///
/// Both ranges are valid and do not overlap.
unsafe fn copy(from: *const u8, to: *mut u8, len: usize) {
    for n in 0..len {
        // SAFETY: promised by the caller.
        unsafe { to.add(n).write_volatile(from.add(n).read_volatile()) };
    }
}
