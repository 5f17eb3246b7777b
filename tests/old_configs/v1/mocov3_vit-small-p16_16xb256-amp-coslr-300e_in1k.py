_base_ = 'mocov3_resnet50_8xb512-amp-coslr-100e_in1k.py'

temperature = 0.2
_base_.crop.scale = (0.08, 1.)  # smaller crops than for a ResNet
train_dataloader = dict(batch_size=256)
model = dict(
    backbone=dict(
        _delete_=True, type='MoCoV3ViT', arch='mocov3-small', img_size=224, patch_size=16, stop_grad_conv1=True),
    neck=dict(in_channels=384, num_layers=3, with_avg_pool=False, vit_backbone=True),
    head=dict(predictor=dict(with_last_bn=True), loss=dict(loss_weight=2 * temperature), temperature=temperature))
optim_wrapper = dict(
    _delete_=True, type='AmpOptimWrapper', loss_scale='dynamic',
    optimizer=dict(type='AdamW', lr=2.4e-3, weight_decay=0.1))
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-4, by_epoch=True, begin=0, end=40, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', T_max=260, by_epoch=True, begin=40, end=300, convert_to_iter_based=True),
]
train_cfg = dict(max_epochs=300)
