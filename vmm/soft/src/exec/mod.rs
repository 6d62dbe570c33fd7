//! What instructions do: one function for each form that the decoder tells apart.

pub(crate) mod alu;
pub(crate) mod atomic;
pub(crate) mod branch;
pub(crate) mod loadstore;
pub(crate) mod maintenance;
pub(crate) mod system;
pub(crate) mod vector_mem;

/// Defines an instruction that works on registers alone: `r` is the register file, `o` the op.
macro_rules! plain {
    ($(#[$doc:meta])* $name:ident $(<$(const $c:ident: $t:ty),*>)?, |$r:ident, $o:ident| $body:block) => {
        $(#[$doc])*
        pub(crate) unsafe fn $name $(<$(const $c: $t),*>)? (
            cpu: &mut $crate::cpu::Cpu,
            op: *const $crate::op::Op,
        ) -> *const $crate::op::Op {
            // SAFETY: `Exec`'s contract.
            let $o = unsafe { &*op };
            let $r = &mut cpu.r;
            $body
            // SAFETY: another op follows one that does not leave its block.
            unsafe { op.add(1) }
        }
    };
}
pub(crate) use plain;

/// Names one instance of a function with const parameters that are known at run time only:
/// `instance!(f [] bool sf, of (0 1 2) kind)`.
macro_rules! instance {
    ($f:ident [$($c:tt)*]) => { $f::<$($c)*> as $crate::op::Exec };
    ($f:ident [$($c:tt)*] bool $e:expr $(, $($rest:tt)*)?) => {
        if $e {
            $crate::exec::instance!($f [$($c)* true,] $($($rest)*)?)
        } else {
            $crate::exec::instance!($f [$($c)* false,] $($($rest)*)?)
        }
    };
    ($f:ident [$($c:tt)*] of16 $e:expr) => {
        match $e & 15 {
            0 => $f::<$($c)* 0>, 1 => $f::<$($c)* 1>, 2 => $f::<$($c)* 2>, 3 => $f::<$($c)* 3>,
            4 => $f::<$($c)* 4>, 5 => $f::<$($c)* 5>, 6 => $f::<$($c)* 6>, 7 => $f::<$($c)* 7>,
            8 => $f::<$($c)* 8>, 9 => $f::<$($c)* 9>, 10 => $f::<$($c)* 10>, 11 => $f::<$($c)* 11>,
            12 => $f::<$($c)* 12>, 13 => $f::<$($c)* 13>, 14 => $f::<$($c)* 14>,
            _ => $f::<$($c)* 15>,
        }
    };
    ($f:ident [$($c:tt)*] of8 $e:expr) => {
        match $e & 7 {
            0 => $f::<$($c)* 0>, 1 => $f::<$($c)* 1>, 2 => $f::<$($c)* 2>, 3 => $f::<$($c)* 3>,
            4 => $f::<$($c)* 4>, 5 => $f::<$($c)* 5>, 6 => $f::<$($c)* 6>,
            _ => $f::<$($c)* 7>,
        }
    };
    ($f:ident [$($c:tt)*] of4 $e:expr) => {
        match $e & 3 {
            0 => $f::<$($c)* 0>, 1 => $f::<$($c)* 1>, 2 => $f::<$($c)* 2>,
            _ => $f::<$($c)* 3>,
        }
    };
}
pub(crate) use instance;
