//! The built-in guest's model device as a device of this side.

use bytes::Bytes;
use multifd_guest::{DeviceRead, ModelDevice};
use multifd_wire::DeviceState;

use super::{DeviceError, DeviceSource, DeviceTraits, PreCopyInfo, Read};

impl DeviceSource for ModelDevice {
    fn traits(&self) -> DeviceTraits {
        DeviceTraits {
            name: self.config().name.clone(),
            flags: self.flags(),
            initial_bytes: self.config().initial,
            state_bytes: self.config().size,
        }
    }

    fn state(&self) -> DeviceState {
        ModelDevice::state(self)
    }

    fn set_state(&mut self, to: DeviceState) -> Result<(), DeviceError> {
        ModelDevice::set_state(self, to).map_err(DeviceError::new)
    }

    fn pre_copy_info(&mut self) -> Result<PreCopyInfo, DeviceError> {
        let info = ModelDevice::pre_copy_info(self).map_err(DeviceError::new)?;
        Ok(PreCopyInfo {
            initial_bytes: info.initial_bytes,
            dirty_bytes: info.dirty_bytes,
            reinit: info.reinit,
        })
    }

    fn read(&mut self, into: &mut [u8]) -> Result<Read, DeviceError> {
        Ok(
            match ModelDevice::read(self, into).map_err(DeviceError::new)? {
                DeviceRead::Bytes(count) => Read::Bytes(count),
                DeviceRead::NothingNow => Read::NothingNow,
                DeviceRead::End => Read::End,
            },
        )
    }

    fn stop_copy_bytes(&mut self) -> Result<u64, DeviceError> {
        Ok(ModelDevice::stop_copy_bytes(self))
    }

    fn config(&mut self) -> Result<Bytes, DeviceError> {
        let config = self.save_config().map_err(DeviceError::new)?;
        Ok(Bytes::from(config))
    }

    fn reset(&mut self) -> Result<(), DeviceError> {
        ModelDevice::reset(self);
        Ok(())
    }
}
