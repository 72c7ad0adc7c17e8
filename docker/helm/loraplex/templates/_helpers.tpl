{{- define "loraplex.name" -}}
{{- .Release.Name | trunc 50 | trimSuffix "-" -}}
{{- end -}}

{{- define "loraplex.selector" -}}
app.kubernetes.io/name: loraplex
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "loraplex.labels" -}}
{{ include "loraplex.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end -}}

{{/* The endpoint picker is none of the replicas: it has a name of its own. */}}
{{- define "loraplex.pickerSelector" -}}
app.kubernetes.io/name: loraplex-endpoint-picker
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "loraplex.pickerLabels" -}}
{{ include "loraplex.pickerSelector" . }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end -}}

{{- define "loraplex.keySecret" -}}
{{- .Values.auth.existingSecret | default (ternary (printf "%s-key" (include "loraplex.name" .)) "" (ne .Values.auth.apiKey "")) -}}
{{- end -}}

{{/* A setting as the server's environment spells it; Helm reads whole numbers as floats, and would
     write large ones with an exponent. */}}
{{- define "loraplex.setting" -}}
{{- if and (kindIs "float64" .) (eq (floor .) .) -}}{{ int64 . }}{{- else -}}{{ . }}{{- end -}}
{{- end -}}

{{/* Where replicas may be: as the user says, or off one another's nodes. */}}
{{- define "loraplex.affinity" -}}
{{- if .Values.affinity -}}
{{- toYaml .Values.affinity -}}
{{- else if ne .Values.antiAffinity "none" -}}
{{- $match := dict "matchLabels" (include "loraplex.selector" . | fromYaml) -}}
{{- $term := dict "topologyKey" "kubernetes.io/hostname" "labelSelector" $match -}}
{{- if eq .Values.antiAffinity "hard" -}}
{{- toYaml (dict "podAntiAffinity" (dict "requiredDuringSchedulingIgnoredDuringExecution" (list $term))) -}}
{{- else -}}
{{- $soft := dict "weight" 100 "podAffinityTerm" $term -}}
{{- toYaml (dict "podAntiAffinity" (dict "preferredDuringSchedulingIgnoredDuringExecution" (list $soft))) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* A new replica has to load a model: early up, late down, one at a time. */}}
{{- define "loraplex.scaling" -}}
scaleUp:
  stabilizationWindowSeconds: 0
scaleDown:
  stabilizationWindowSeconds: {{ .Values.autoscaling.scaleDownStabilizationSeconds }}
  policies:
    - {type: Pods, value: 1, periodSeconds: 60}
{{- end -}}

{{/* How long a route waits for the end of an answer: longer than the server. */}}
{{- define "loraplex.requestTimeout" -}}
{{- $server := int (.Values.settings.request_timeout_s | default 600) -}}
{{- .Values.inference.httpRoute.requestTimeout | default (printf "%ds" (add $server 20)) -}}
{{- end -}}

{{/* Refuses what could be installed but would not work. */}}
{{- define "loraplex.check" -}}
{{- $several := or .Values.autoscaling.enabled (gt (int .Values.replicas) 1) -}}
{{- $shared := and .Values.sharedStorage.registrySecret .Values.sharedStorage.blobUrl -}}
{{- if and (or .Values.sharedStorage.registrySecret .Values.sharedStorage.blobUrl) (not $shared) -}}
{{- fail "sharedStorage needs both registrySecret and blobUrl: names without files, or files without names, serve nobody" -}}
{{- end -}}
{{- if and $several (not $shared) -}}
{{- fail "several replicas need sharedStorage.registrySecret and sharedStorage.blobUrl: without them an adapter would exist on the one replica that took its upload" -}}
{{- end -}}
{{- if and $several (not (include "loraplex.keySecret" .)) -}}
{{- fail "several replicas need one key: set auth.existingSecret or auth.apiKey" -}}
{{- end -}}
{{- if and .Values.auth.existingSecret .Values.auth.apiKey -}}
{{- fail "set auth.existingSecret or auth.apiKey, not both" -}}
{{- end -}}
{{- if and .Values.autoscaling.enabled (eq .Values.autoscaling.kind "keda") (not .Values.autoscaling.prometheusUrl) -}}
{{- fail "autoscaling.kind keda asks Prometheus: set autoscaling.prometheusUrl" -}}
{{- end -}}
{{- if and .Values.inference.enabled .Values.inference.gateway.create -}}
{{- if not .Values.inference.gateway.className -}}
{{- fail "inference.gateway.create needs inference.gateway.className: kubectl get gatewayclass lists what your cluster has" -}}
{{- end -}}
{{- if .Values.inference.httpRoute.gatewayNamespace -}}
{{- fail "inference.gateway.create makes the Gateway in the release's namespace: leave inference.httpRoute.gatewayNamespace empty" -}}
{{- end -}}
{{- end -}}
{{- end -}}
