//! System registers by their architectural encoding.

use std::fmt;

/// A system register: op0, op1, CRn, CRm, op2 packed as in the MSR/MRS instruction's bits 20 to 5
/// (op0:2, op1:3, CRn:4, CRm:4, op2:3), the same number that KVM and Hypervisor.framework use.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SysReg(pub u16);

impl SysReg {
    /// The register of these fields.
    pub const fn new(op0: u16, op1: u16, crn: u16, crm: u16, op2: u16) -> Self {
        Self(op0 << 14 | op1 << 11 | crn << 7 | crm << 3 | op2)
    }
}

impl fmt::Debug for SysReg {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let SysReg(r) = *self;
        write!(f, "S{}_{}_C{}_C{}_{}", r >> 14, r >> 11 & 7, r >> 7 & 15, r >> 3 & 15, r & 7)
    }
}

impl fmt::Display for SysReg {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}
