//! Checked conversions of members and models.

use bytes::Bytes;
use longshore_blocks::Deployment;

use super::{Describe, Member, ModelDescription, Role};
use crate::{WireError, types::check, v1};

impl Role {
    fn from_wire(value: i32) -> Result<Self, WireError> {
        match v1::Role::try_from(value) {
            Ok(v1::Role::Router) => Ok(Self::Router),
            Ok(v1::Role::Prefill) => Ok(Self::Prefill),
            Ok(v1::Role::Decode) => Ok(Self::Decode),
            Ok(v1::Role::Kvstore) => Ok(Self::KvStore),
            Ok(v1::Role::Unspecified) => Err(WireError::invalid("role", "is not set")),
            Err(_) => Err(WireError::invalid("role", format!("is {value}, which is no known role"))),
        }
    }
}

impl From<Role> for v1::Role {
    fn from(role: Role) -> Self {
        match role {
            Role::Router => Self::Router,
            Role::Prefill => Self::Prefill,
            Role::Decode => Self::Decode,
            Role::KvStore => Self::Kvstore,
        }
    }
}

impl TryFrom<v1::Member> for Member {
    type Error = WireError;

    fn try_from(wire: v1::Member) -> Result<Self, WireError> {
        if wire.id.is_empty() {
            return Err(WireError::invalid("id", "is missing"));
        }
        Ok(Self {
            id: wire.id,
            role: Role::from_wire(wire.role)?,
            address: wire.address,
            incarnation: wire.incarnation,
            weight: wire.weight,
            healthy: wire.healthy,
            host: wire.host,
            zone: wire.zone,
        })
    }
}

impl From<Member> for v1::Member {
    fn from(member: Member) -> Self {
        Self {
            id: member.id,
            role: v1::Role::from(member.role).into(),
            address: member.address,
            incarnation: member.incarnation,
            weight: member.weight,
            healthy: member.healthy,
            host: member.host,
            zone: member.zone,
        }
    }
}

impl TryFrom<v1::ModelDescription> for ModelDescription {
    type Error = WireError;

    fn try_from(wire: v1::ModelDescription) -> Result<Self, WireError> {
        if wire.name.is_empty() {
            return Err(WireError::invalid("name", "is missing"));
        }
        Ok(Self {
            name: wire.name,
            architecture: wire.architecture,
            max_context_tokens: wire.max_context_tokens,
            vocabulary: wire.vocabulary,
            tile_shape: check::required(wire.tile_shape, "tile_shape")?,
            kv_bytes_per_token: wire.kv_bytes_per_token,
            deployment: Deployment::from_bytes(check::exact(&wire.deployment, "deployment")?),
        })
    }
}

impl From<ModelDescription> for v1::ModelDescription {
    fn from(model: ModelDescription) -> Self {
        Self {
            name: model.name,
            architecture: model.architecture,
            max_context_tokens: model.max_context_tokens,
            vocabulary: model.vocabulary,
            tile_shape: Some(model.tile_shape.into()),
            kv_bytes_per_token: model.kv_bytes_per_token,
            deployment: Bytes::copy_from_slice(model.deployment.as_bytes()),
        }
    }
}

impl TryFrom<v1::ListModelsResponse> for Vec<ModelDescription> {
    type Error = WireError;

    fn try_from(wire: v1::ListModelsResponse) -> Result<Self, WireError> {
        check::each(wire.models, "models")
    }
}

impl From<Vec<ModelDescription>> for v1::ListModelsResponse {
    fn from(models: Vec<ModelDescription>) -> Self {
        Self { models: models.into_iter().map(Into::into).collect() }
    }
}

impl TryFrom<v1::DescribeResponse> for Describe {
    type Error = WireError;

    fn try_from(wire: v1::DescribeResponse) -> Result<Self, WireError> {
        Ok(Self {
            this: check::required(wire.self_, "self")?,
            members: check::each(wire.members, "members")?,
            epoch: wire.epoch,
            models: check::each(wire.models, "models")?,
            version: wire.version,
        })
    }
}

impl From<Describe> for v1::DescribeResponse {
    fn from(describe: Describe) -> Self {
        Self {
            self_: Some(describe.this.into()),
            members: describe.members.into_iter().map(Into::into).collect(),
            epoch: describe.epoch,
            models: describe.models.into_iter().map(Into::into).collect(),
            version: describe.version,
        }
    }
}
