//! The built-in guest's model device as a device of this side.

use multifd_guest::ModelDevice;
use multifd_wire::DeviceState;
use multifd_wire::frame::DeviceFlags;

use super::{DeviceError, DeviceSink};

impl DeviceSink for ModelDevice {
    fn name(&self) -> &str {
        &self.config().name
    }

    fn flags(&self) -> DeviceFlags {
        ModelDevice::flags(self)
    }

    fn state(&self) -> DeviceState {
        ModelDevice::state(self)
    }

    fn set_state(&mut self, to: DeviceState) -> Result<(), DeviceError> {
        ModelDevice::set_state(self, to).map_err(DeviceError::new)
    }

    fn write(&mut self, octets: &[u8]) -> Result<(), DeviceError> {
        ModelDevice::write(self, octets).map_err(DeviceError::new)
    }

    fn load_config(&mut self, octets: &[u8]) -> Result<(), DeviceError> {
        ModelDevice::load_config(self, octets).map_err(DeviceError::new)
    }

    fn restart(&mut self) -> Result<(), DeviceError> {
        ModelDevice::restart(self).map_err(DeviceError::new)
    }
}
