//! How the control plane's JSON spells numbers of 64 bits, and the placement map with its epoch.
//!
//! Such numbers are hexadecimal digits: as JSON numbers they do not survive every parser.

use flux_core::placement::PlacementMap;
use serde::{Deserialize, Serialize};

use super::registry::Placement;

/// A placement map as it is stored.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct StoredMap {
    pub(super) epoch: u64,
    #[serde(flatten)]
    pub(super) map: PlacementMap,
}

impl StoredMap {
    /// The bytes of a map.
    pub(super) fn encode(epoch: u64, map: &PlacementMap) -> Vec<u8> {
        let stored = StoredMap { epoch, map: map.clone() };
        serde_json::to_vec(&stored).expect("plain fields")
    }

    /// Reads a map back.
    ///
    /// # Errors
    /// What is wrong with it, in words.
    pub(super) fn decode(bytes: &[u8]) -> Result<Placement, String> {
        let stored: StoredMap = serde_json::from_slice(bytes).map_err(|error| error.to_string())?;
        stored.placement()
    }

    /// Checks it.
    ///
    /// # Errors
    /// The rule that it breaks, in words.
    pub(super) fn placement(self) -> Result<Placement, String> {
        self.map.validate().map_err(|error| error.to_string())?;
        Ok(Placement { epoch: self.epoch, map: self.map.into() })
    }
}

/// `#[serde(with)]`: a number of 64 bits.
pub(super) mod hex {
    use serde::{Deserialize as _, Deserializer, Serializer, de::Error as _};

    pub(crate) fn serialize<S: Serializer>(number: &u64, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(&format_args!("{number:016x}"))
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<u64, D::Error> {
        let text = String::deserialize(from)?;
        u64::from_str_radix(&text, 16)
            .map_err(|_| D::Error::custom(format!("{text:?} is not hexadecimal")))
    }
}

/// `#[serde(with)]`: a number of 64 bits, or null.
pub(super) mod optional_hex {
    use serde::{Deserialize as _, Deserializer, Serialize as _, Serializer, de::Error as _};

    pub(crate) fn serialize<S: Serializer>(number: &Option<u64>, to: S) -> Result<S::Ok, S::Error> {
        number.map(|number| format!("{number:016x}")).serialize(to)
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Option<u64>, D::Error> {
        let number = |text: String| {
            u64::from_str_radix(&text, 16)
                .map_err(|_| D::Error::custom(format!("{text:?} is not hexadecimal")))
        };
        Option::<String>::deserialize(from)?.map(number).transpose()
    }
}
