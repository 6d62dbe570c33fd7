use super::DataFn;

pub(super) fn decode(_insn: u32) -> Option<DataFn> {
    None
}
