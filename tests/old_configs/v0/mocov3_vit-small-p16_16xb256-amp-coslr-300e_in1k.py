_base_ = 'mocov3_resnet50_8xb512-amp-coslr-100e_in1k.py'

pair = {{_base_.pair}}
pair[0][0]['scale'] = (0.08, 1.)
pair[1][0]['scale'] = (0.08, 1.)
data = dict(samples_per_gpu=256, train=dict(pipelines=pair))
model = dict(
    backbone=dict(
        _delete_=True, type='VisionTransformer', arch='mocov3-small', img_size=224, patch_size=16,
        stop_grad_conv1=True),
    neck=dict(in_channels=384, num_layers=3, with_avg_pool=False, vit_backbone=True),
    head=dict(predictor=dict(with_last_bn=True), temperature=0.2))
optimizer = dict(_delete_=True, type='AdamW', lr=2.4e-3, weight_decay=0.1)
lr_config = dict(warmup_iters=40)
runner = dict(max_epochs=300)
