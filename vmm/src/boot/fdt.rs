//! The device tree: everything that the guest knows about its machine.

use squib_devices::{gic, map};
use vm_fdt::{FdtWriter, FdtWriterNode};

use super::load::FDT_AREA;

/// Phandle of the interrupt controller.
const GIC: u32 = 1;
/// Phandle of the fixed clock that feeds PL011-style peripherals.
const CLOCK: u32 = 2;
/// Input clock of the serial port in hertz: what a 16550A has on a PC.
const SERIAL_CLOCK_HZ: u32 = 1_843_200;
/// Input clock of the RTC's bus interface in hertz.
const APB_CLOCK_HZ: u32 = 24_000_000;
/// First cell of a GICv3 interrupt: a shared peripheral interrupt.
const SPI: u32 = 0;
/// First cell of a GICv3 interrupt: a private peripheral interrupt.
const PPI: u32 = 1;
/// Third cell of an interrupt: rising edge.
const EDGE_RISING: u32 = 1;
/// Third cell of an interrupt: level, active high.
const LEVEL_HIGH: u32 = 4;

/// What the tree depends on.
#[derive(Clone, Copy, Debug)]
pub struct Guest<'a> {
    /// RAM in bytes, the system area included.
    pub memory: u64,
    /// Number of vCPUs.
    pub vcpus: u32,
    /// Kernel command line.
    pub cmdline: &'a str,
    /// First address of the initrd and the one behind it.
    pub initrd: Option<(u64, u64)>,
    /// virtio-mmio slots in use, from slot 0.
    pub virtio_slots: u32,
    /// Entropy for the guest's random number generator.
    pub rng_seed: &'a [u8],
    /// Entropy for the kernel's own address.
    pub kaslr_seed: u64,
}

/// Why the tree cannot be written.
#[derive(Debug, thiserror::Error)]
pub enum FdtError {
    /// The writer refused a name or value.
    #[error("{0}")]
    Write(#[from] vm_fdt::Error),
    /// It is longer than its place.
    #[error("it has {length} bytes, and there is room for {FDT_AREA}")]
    TooLarge {
        /// Its length.
        length: usize,
    },
}

/// The flattened device tree of `guest`.
pub fn device_tree(guest: &Guest<'_>) -> Result<Vec<u8>, FdtError> {
    let mut tree = FdtWriter::new()?;
    let root = tree.begin_node("")?;
    tree.property_string("compatible", "linux,dummy-virt")?;
    tree.property_string("model", "squib")?;
    tree.property_u32("#address-cells", 2)?;
    tree.property_u32("#size-cells", 2)?;
    tree.property_u32("interrupt-parent", GIC)?;
    chosen(&mut tree, guest)?;
    cpus(&mut tree, guest.vcpus)?;
    memory(&mut tree, guest.memory)?;
    firmware(&mut tree)?;
    interrupts_and_timers(&mut tree, guest.vcpus)?;
    devices(&mut tree)?;
    for slot in 0..guest.virtio_slots {
        virtio(&mut tree, slot)?;
    }
    tree.end_node(root)?;
    Ok(tree.finish()?)
}

fn chosen(tree: &mut FdtWriter, guest: &Guest<'_>) -> Result<(), FdtError> {
    let node = tree.begin_node("chosen")?;
    tree.property_string("bootargs", guest.cmdline)?;
    tree.property_string("stdout-path", &format!("/serial@{:x}", map::SERIAL.base))?;
    if let Some((start, end)) = guest.initrd {
        tree.property_u64("linux,initrd-start", start)?;
        tree.property_u64("linux,initrd-end", end)?;
    }
    tree.property("rng-seed", guest.rng_seed)?;
    tree.property_u64("kaslr-seed", guest.kaslr_seed)?;
    Ok(tree.end_node(node)?)
}

fn cpus(tree: &mut FdtWriter, vcpus: u32) -> Result<(), FdtError> {
    let node = tree.begin_node("cpus")?;
    tree.property_u32("#address-cells", 2)?;
    tree.property_u32("#size-cells", 0)?;
    for n in 0..vcpus {
        let affinity = gic::affinity(n);
        let cpu = tree.begin_node(&format!("cpu@{affinity:x}"))?;
        tree.property_string("device_type", "cpu")?;
        tree.property_string("compatible", "arm,armv8")?;
        tree.property_string("enable-method", "psci")?;
        tree.property_u64("reg", affinity)?;
        tree.end_node(cpu)?;
    }
    Ok(tree.end_node(node)?)
}

/// RAM without the system area.
fn memory(tree: &mut FdtWriter, size: u64) -> Result<(), FdtError> {
    let base = map::RAM_BASE + map::SYSTEM_AREA_SIZE;
    let node = tree.begin_node(&format!("memory@{base:x}"))?;
    tree.property_string("device_type", "memory")?;
    tree.property_array_u64("reg", &[base, size.saturating_sub(map::SYSTEM_AREA_SIZE)])?;
    Ok(tree.end_node(node)?)
}

fn firmware(tree: &mut FdtWriter) -> Result<(), FdtError> {
    let node = tree.begin_node("psci")?;
    let compatible = ["arm,psci-1.0", "arm,psci-0.2"].map(str::to_owned).to_vec();
    tree.property_string_list("compatible", compatible)?;
    tree.property_string("method", "hvc")?;
    Ok(tree.end_node(node)?)
}

fn interrupts_and_timers(tree: &mut FdtWriter, vcpus: u32) -> Result<(), FdtError> {
    let gicr = u64::from(vcpus) * map::GICR_STRIDE;
    let node = tree.begin_node(&format!("interrupt-controller@{:x}", map::GICD.base))?;
    tree.property_string("compatible", "arm,gic-v3")?;
    tree.property_null("interrupt-controller")?;
    tree.property_u32("#interrupt-cells", 3)?;
    tree.property_u32("#address-cells", 2)?;
    tree.property_u32("#size-cells", 2)?;
    tree.property_array_u64("reg", &[map::GICD.base, map::GICD.size, map::GICR.base, gicr])?;
    tree.property_phandle(GIC)?;
    tree.end_node(node)?;

    // Secure physical, physical, virtual, hypervisor: the order is the binding's. The first and last
    // do not exist here, but the binding counts positions.
    let node = tree.begin_node("timer")?;
    tree.property_string("compatible", "arm,armv8-timer")?;
    let lines = [13, map::CNTP_INTID - 16, map::CNTV_INTID - 16, 10];
    let cells: Vec<u32> = lines.iter().flat_map(|ppi| [PPI, *ppi, LEVEL_HIGH]).collect();
    tree.property_array_u32("interrupts", &cells)?;
    tree.property_null("always-on")?;
    Ok(tree.end_node(node)?)
}

fn devices(tree: &mut FdtWriter) -> Result<(), FdtError> {
    let node = tree.begin_node("apb-pclk")?;
    tree.property_string("compatible", "fixed-clock")?;
    tree.property_u32("#clock-cells", 0)?;
    tree.property_u32("clock-frequency", APB_CLOCK_HZ)?;
    tree.property_string("clock-output-names", "clk24mhz")?;
    tree.property_phandle(CLOCK)?;
    tree.end_node(node)?;

    let node = device(tree, "serial", map::SERIAL, map::SERIAL_INTID, LEVEL_HIGH)?;
    tree.property_string("compatible", "ns16550a")?;
    tree.property_u32("clock-frequency", SERIAL_CLOCK_HZ)?;
    tree.end_node(node)?;

    let node = device(tree, "rtc", map::RTC, map::RTC_INTID, LEVEL_HIGH)?;
    tree.property_string_list(
        "compatible",
        ["arm,pl031", "arm,primecell"].map(str::to_owned).to_vec(),
    )?;
    tree.property_u32("clocks", CLOCK)?;
    tree.property_string("clock-names", "apb_pclk")?;
    tree.end_node(node)?;

    let node = device(tree, "vmgenid", map::VMGENID, map::VMGENID_INTID, EDGE_RISING)?;
    tree.property_string("compatible", "microsoft,vmgenid")?;
    Ok(tree.end_node(node)?)
}

fn virtio(tree: &mut FdtWriter, slot: u32) -> Result<(), FdtError> {
    let base = map::VIRTIO.base + u64::from(slot) * map::VIRTIO_STRIDE;
    let range = map::Range { base, size: map::VIRTIO_STRIDE };
    let node = device(tree, "virtio_mmio", range, map::VIRTIO_INTID + slot, EDGE_RISING)?;
    tree.property_string("compatible", "virtio,mmio")?;
    tree.property_null("dma-coherent")?;
    Ok(tree.end_node(node)?)
}

/// Opens the node of a device with one range and one shared interrupt.
fn device(
    tree: &mut FdtWriter,
    name: &str,
    range: map::Range,
    intid: u32,
    trigger: u32,
) -> Result<FdtWriterNode, FdtError> {
    let node = tree.begin_node(&format!("{name}@{:x}", range.base))?;
    tree.property_array_u64("reg", &[range.base, range.size])?;
    tree.property_array_u32("interrupts", &[SPI, intid - map::SPI_BASE, trigger])?;
    Ok(node)
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;

    /// Properties by node path and name, read back by the Devicetree Specification, section 5.4.
    fn parse(tree: &[u8]) -> HashMap<String, Vec<u8>> {
        let word = |at: usize| u32::from_be_bytes(tree[at..at + 4].try_into().unwrap());
        let text = |at: usize| {
            let end = tree[at..].iter().position(|byte| *byte == 0).unwrap();
            String::from_utf8(tree[at..at + end].to_vec()).unwrap()
        };
        assert_eq!(word(0), 0xd00d_feed);
        assert_eq!(word(4) as usize, tree.len());
        let (mut at, strings) = (word(8) as usize, word(12) as usize);
        let (mut path, mut found) = (Vec::new(), HashMap::new());
        loop {
            let token = word(at);
            at += 4;
            match token {
                1 => {
                    path.push(text(at));
                    at += (text(at).len() + 4) & !3;
                }
                2 => drop(path.pop()),
                3 => {
                    let (length, name) = (word(at) as usize, word(at + 4) as usize);
                    let key = format!("{}/{}", path.join("/"), text(strings + name));
                    found.insert(key, tree[at + 8..at + 8 + length].to_vec());
                    at += 8 + ((length + 3) & !3);
                }
                4 => {}
                9 => return found,
                other => panic!("token {other}"),
            }
        }
    }

    fn guest(cmdline: &str) -> Guest<'_> {
        Guest {
            memory: 256 << 20,
            vcpus: 2,
            cmdline,
            initrd: Some((0x8800_0000, 0x8812_3456)),
            virtio_slots: 2,
            rng_seed: &[9; 64],
            kaslr_seed: 3,
        }
    }

    fn cells(value: &[u8]) -> Vec<u32> {
        value.chunks(4).map(|cell| u32::from_be_bytes(cell.try_into().unwrap())).collect()
    }

    #[test]
    fn the_tree_describes_the_memory_map() {
        let tree = parse(&device_tree(&guest("console=ttyS0")).unwrap());
        assert_eq!(tree["/chosen/bootargs"], b"console=ttyS0\0");
        assert_eq!(tree["/chosen/stdout-path"], b"/serial@e0a0000\0");
        assert_eq!(tree["/chosen/linux,initrd-end"], 0x8812_3456u64.to_be_bytes());
        assert_eq!(tree["/chosen/rng-seed"], [9; 64]);
        assert_eq!(cells(&tree["/memory@80200000/reg"]), [0, 0x8020_0000, 0, 254 << 20]);
        assert_eq!(
            cells(&tree["/interrupt-controller@8000000/reg"]),
            [0, 0x0800_0000, 0, 0x1_0000, 0, 0x080A_0000, 0, 0x4_0000]
        );
        assert_eq!(cells(&tree["/timer/interrupts"]), [1, 13, 4, 1, 14, 4, 1, 11, 4, 1, 10, 4]);
        assert_eq!(cells(&tree["/serial@e0a0000/interrupts"]), [0, 1, 4]);
        assert_eq!(cells(&tree["/rtc@e0b0000/interrupts"]), [0, 2, 4]);
        assert_eq!(cells(&tree["/vmgenid@80001000/reg"]), [0, 0x8000_1000, 0, 16]);
        assert_eq!(cells(&tree["/virtio_mmio@f001000/interrupts"]), [0, 17, 1]);
        assert!(!tree.contains_key("/virtio_mmio@f002000/reg"));
        assert_eq!(tree["/cpus/cpu@1/enable-method"], b"psci\0");
        assert_eq!(tree["/psci/method"], b"hvc\0");
        assert_eq!(tree["/rtc@e0b0000/clocks"], tree["/apb-pclk/phandle"]);
    }

    #[test]
    fn the_largest_tree_fits_its_place() {
        let cmdline = "x".repeat(crate::config::CMDLINE_MAX - 1);
        let most = Guest {
            vcpus: map::MAX_VCPUS,
            virtio_slots: map::VIRTIO_SLOTS as u32,
            ..guest(&cmdline)
        };
        assert!((device_tree(&most).unwrap().len() as u64) < FDT_AREA);
    }
}
